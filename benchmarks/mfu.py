"""Model-FLOPs utilisation of a train step: the arithmetic that the model asks for, over what the device could do.

    python benchmarks/mfu.py [--size 135m] [--rows 4] [--length 256] [--dtype float32] [--rounds 5]

    utilisation = FLOPs of the model a step / (seconds a step * peak)

FLOPs of the model a token: 6 N + 12 L S H d for a full step, 4 N + 12 L S H d with frozen weights. N are the weights
that are multiplied (the vocabulary head among them), S is the mean length attended to and H d the width of the heads;
what is computed again to save memory counts nothing (Chowdhery et al. 2022, PaLM, appendix B). The peak is the best
rate of a large matrix product measured here in the same dtype. The plain step beside it is the same forward pass under
`jax.grad` and plain SGD: no adapter, no edits, no objective, no packing. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from step_time import random_batch

from aif.adapter import lora
from aif.models.decoder import DecoderConfig
from aif.models.module import random_params
from aif.objectives.sft import sft
from aif.policy import Policy
from aif.train import Optimizer, start_state, train_step
from aif.types import Batch, as_partial

SIZES = {  # vocabulary, width, layers, heads, key-value heads, head width, feed-forward width
    "135m": DecoderConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, tied=True, max_position=8192),
    "360m": DecoderConfig("llama", 49152, 960, 32, 15, 5, 64, 2560, tied=True, max_position=8192),
    "1b": DecoderConfig("llama", 128256, 2048, 16, 32, 8, 64, 8192, tied=True, max_position=8192),
    "8b": DecoderConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, max_position=8192),
}


def model_flops(config: DecoderConfig, tokens: int, length: int, *, full: bool) -> float:
    """FLOPs that forward and backward of so many tokens need, attended to causally within rows of this length."""
    heads, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    layer = config.width * (2 * heads + 2 * keys + 3 * config.ff)
    weights = config.layers * layer + config.vocab * config.width
    attention = 4 * config.layers * heads * length / 2
    forward = 2 * weights + attention
    return tokens * forward * (3 if full else 2) + (0 if full else tokens * attention)  # both factors have gradients


def peak(dtype: Any, side: int) -> float:
    """FLOP/s of the fastest of three large matrix products."""
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    best = 0.0
    for shape in ((side, side, side), (1024, 576, 1536), (side // 2, side, 2 * side)):
        m, k, n = shape
        x, y = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        calls = max(1, int(2e11 / (2 * m * k * n)))
        jax.block_until_ready(product(x, y))
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready([product(x, y) for _ in range(calls)])
            best = max(best, 2 * m * k * n * calls / (time.perf_counter() - began))
    return best


def engine(policy: Policy, batch: Batch, *, full: bool) -> Callable[[], Any]:
    """One step of the engine: adapter or copy of the weights, objective, AdamW."""
    start = policy.params if full else lora(policy.config, rank=16, alpha=32, key=jax.random.key(0))
    state = start_state(start, jax.random.key(1))
    loss, values = as_partial(sft().loss), Optimizer(learning_rate=1e-4, schedule="constant").values(0, 1)
    stack = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    held = {"state": state}

    def step() -> Any:
        held["state"], log = train_step(held["state"], policy, stack, loss, values, full=full)
        return log["loss"].value

    return step


def plain(policy: Policy, batch: Batch) -> Callable[[], Any]:
    """The same model under `jax.grad`: whole logits row by row, all weights, SGD."""
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params: Any) -> jax.Array:
        bare = policy.replace(params=params)
        hidden = bare(batch).hidden[:, :-1]
        logp = jax.nn.log_softmax(bare.head(hidden).astype(jnp.float32), axis=-1)
        return -jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=-1).mean()

    @jax.jit
    def once(params: Any) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - (1e-6 * g).astype(p.dtype), params, gradient), value

    held = {"params": policy.params}

    def step() -> Any:
        held["params"], value = once(held["params"])
        return value

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[4])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", default="linear", help="as `model.remat` of a config")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config, dtype = SIZES[args.size], jnp.dtype(args.dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(config, 0))
    policy = Policy(params, config=config, remat=args.remat, compute_dtype=dtype)
    device = jax.devices()[0]
    top = peak(dtype, 2048 if device.platform == "cpu" else 8192)
    print(f"{device.device_kind}, {args.dtype}, best product {top / 1e9:.0f} GFLOP/s; {args.size}\n")
    print("| tokens a step | work | s a step | tokens/s | utilisation | of the plain step |\n|---|---|---|---|---|---|")
    found = []
    for rows in args.rows:
        batch, tokens = random_batch(rows, args.length, config.vocab), rows * args.length
        steps = {
            "plain": plain(policy, batch),
            "full": engine(policy, batch, full=True),
            "LoRA": engine(policy, batch, full=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(args.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                jax.block_until_ready(step())
                if turn:  # the first one compiles
                    seconds[name].append(time.perf_counter() - began)
        share = {}
        for name, times in seconds.items():
            s = statistics.median(times)
            share[name] = model_flops(config, tokens, args.length, full=name != "LoRA") / s / top
            line = {"tokens": tokens, "work": name, "seconds": s, "utilisation": share[name]}
            found.append(line | {"of_plain": share[name] / share["plain"]})
            print(
                f"| {tokens} | {name} | {s:.3f} | {tokens / s:.0f} | {share[name]:.0%} "
                f"| {share[name] / share['plain']:.2f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"device": device.device_kind, "peak": top, "steps": found}, indent=1))


if __name__ == "__main__":
    main()
