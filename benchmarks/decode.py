"""Time greedy decoding beside transformers.generate, and steered beside plain decoding.

    python benchmarks/decode.py --torch .venv-torch/bin/python [--batches 1,8,16] [--repeats 3]

SmolLM2-135M-Instruct, float32, random prompts of 32 tokens, 64 new tokens a row, no end token. Every measurement is a
process of its own; ours and transformers' alternate `--repeats` times, and the table shows medians over the processes
of their own medians, by wall seconds and by processor seconds, which other work on the machine disturbs less.
Steered decoding (one direction, a dose per row) alternates with plain decoding inside one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_time import HERE, MODEL, model, spawn

ROUNDS = 3


def clocked(run: Callable[[Any], object], policy: Any) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    began, used = time.perf_counter(), time.process_time()
    run(policy)
    return time.perf_counter() - began, time.process_time() - used


def ours(batches: list[int], prompt: int, tokens: int) -> dict:
    """Median seconds of plain and of steered decoding for every batch size, after a call of each that compiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from aif.sampling import generate
    from aif.steering import add

    policy, _ = model()
    config = policy.config
    direction = jax.random.normal(jax.random.key(0), (config.layers, config.width))
    found: dict[str, dict] = {name: {} for name in ("seconds", "processor", "steered", "steered processor")}
    for rows in batches:
        ids = np.random.default_rng(rows).integers(100, config.vocab - 100, (rows, prompt)).tolist()
        doses = jnp.linspace(-0.5, 0.5, rows)
        edits = add(direction, doses, jnp.ones(config.layers), layers=[config.layers // 2])
        run = lambda p, ids=ids: np.asarray(generate(p, ids, new_tokens=tokens, stop=config.vocab).tokens)  # noqa: E731
        policies = {"": policy, "steered": policy.replace(edits=edits)}
        times: dict[str, list] = {name: [] for name in policies}
        for number in range(ROUNDS + 1):
            for name, p in policies.items():
                taken = clocked(run, p)
                times[name] += [taken] if number else []
        for name, taken in times.items():
            wall, processor = (statistics.median(t[k] for t in taken) for k in (0, 1))
            found[name or "seconds"][rows] = wall
            found[f"{name} processor".strip()][rows] = processor
    return found


def medians(results: list[dict], key: str, rows: int) -> float:
    return statistics.median(r[key][str(rows)] for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, help="the interpreter of an environment with peers/requirements.txt")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".bench" / MODEL, help="where torch's weights go")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = [int(x) for x in args.batches.split(",")]
    if args.one:
        print(json.dumps(ours(batches, args.prompt, args.tokens)))
        return
    if not args.folder.exists():
        from aif.models.hub import fetch

        make = str(HERE / "peers" / "make_hf_folder.py")
        spawn([str(args.torch), make, "--gguf", str(fetch(MODEL)), "--out", str(args.folder)])
    size = ["--batches", args.batches, "--prompt", str(args.prompt), "--tokens", str(args.tokens)]
    mine, peer = [], []
    for _ in range(args.repeats):
        mine.append(spawn([sys.executable, __file__, "--one", *size]))
        script = str(HERE / "peers" / "torch_decode.py")
        peer.append(spawn([str(args.torch), script, "--model", str(args.folder), "--rounds", str(ROUNDS), *size]))
    print("| batch | aif, tokens/s | transformers, tokens/s | ratio | processor ratio | steered / plain (processor) |")
    print("|---|---|---|---|---|---|")
    for rows in batches:
        a, b = medians(mine, "seconds", rows), medians(peer, "seconds", rows)
        processor = medians(peer, "processor", rows) / medians(mine, "processor", rows)
        total = rows * args.tokens
        steered = statistics.median(r["steered"][str(rows)] / r["seconds"][str(rows)] for r in mine)
        beside = statistics.median(r["steered processor"][str(rows)] / r["processor"][str(rows)] for r in mine)
        speeds = f"| {rows} | {total / a:.0f} | {total / b:.0f} | {b / a:.2f} | {processor:.2f} |"
        print(f"{speeds} {steered:.3f} ({beside:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
