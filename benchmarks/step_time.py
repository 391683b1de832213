"""Time a train step, side by side with plain torch + peft and TRL's SFTTrainer.

    make bench
    python benchmarks/step_time.py --torch .venv-torch/bin/python [--repeats 3] [--only step,corpus]

SmolLM2-135M-Instruct, LoRA of rank 16 on every linear layer, float32. Every measurement is a process of its own; ours
and the other tool's alternate `--repeats` times, and the table shows medians of the processes' own medians.

    step        4 x 256 random tokens, all scored, against torch eager + peft
    compiled    the same against torch.compile; only when asked for, since it needs a C++ compiler
    full        the same, every weight trained, against torch eager
    corpus      the bundled corpus, useful (non-padding) tokens a second, against TRL's SFTTrainer
    objectives  a dpo and an efe step against an sft step on the same packed tokens; prefix sharing; zero edits
    compile     the first step, cold and from the compilation cache
    import      `aif --help`
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
ROUNDS = 8


def median_seconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median wall time of `run`, after one call that warms up."""
    run()
    return statistics.median(timed(run) for _ in range(rounds))


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


class Stepper:
    """A training state whose steps can be timed; it must not be shared between objectives."""

    def __init__(self, policy, objective, full: bool = False):
        import jax
        import jax.numpy as jnp

        from aif.adapter import lora
        from aif.train import Optimizer, as_partial, start_state

        self.policy, self.loss, self.full = policy, as_partial(objective.loss), full
        copied = lambda: jax.tree.map(jnp.copy, policy.params)  # noqa: E731  a step gives its buffers back
        trained = copied() if full else lora(policy.config, rank=16, alpha=32, key=jax.random.key(0))
        self.state = start_state(trained, jax.random.key(1))
        self.values = Optimizer(learning_rate=1e-4, schedule="constant").values(0, 1)

    def __call__(self, batch) -> float:
        import jax
        import numpy as np

        from aif.train import train_step

        stack = jax.tree.map(lambda x: np.asarray(x)[None], batch)
        self.state, log = train_step(self.state, self.policy, stack, self.loss, self.values, full=self.full)
        return float(log["loss"].value)


def model(**options):
    """The real model's policy and tokenizer."""
    import aif
    from aif.runtime import compilation_cache

    compilation_cache()
    lm = aif.load(MODEL)
    return aif.bind(lm, remat="linear", **options), lm.tokenizer


def random_batch(rows: int, length: int, vocab: int):
    """Random texts, every token but the first scored."""
    import numpy as np

    from aif.types import Batch

    tokens = np.random.default_rng(0).integers(100, vocab - 100, (rows, length)).astype(np.int32)
    index = np.broadcast_to(np.arange(length - 1), (rows, length - 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length), (rows, length)).astype(np.int32)
    zeros, slot = np.zeros_like(tokens), np.zeros((rows, 1), np.int32)
    ones = np.ones((rows, length - 1), np.float32)
    parts = (tokens, positions, zeros + 1, zeros, index, tokens[:, 1:], ones, zeros[:, 1:], slot, slot)
    return Batch(*parts, extras={})  # type: ignore[arg-type]


def ours_step(full: bool = False) -> dict:
    """Tokens a second of one step on 4 x 256 tokens, its compile time, and the peak of memory."""
    from aif.objectives.sft import sft

    policy, _ = model()
    batch, step = random_batch(4, 256, policy.config.vocab), Stepper(policy, sft(), full)
    first = timed(lambda: step(batch))
    seconds = median_seconds(lambda: step(batch))
    return {"tokens_per_second": 4 * 256 / seconds, "first_step": first, "step": seconds, "peak_mb": peak_mb()}


def ours_full() -> dict:
    return ours_step(full=True)


def ours_corpus() -> dict:
    """Useful tokens a second over the bundled corpus, packed into rows of 512."""
    from aif.batches import build, stream
    from aif.corpus import bundled, read
    from aif.objectives.sft import sft

    policy, tokenizer = model()
    data = build(
        read(bundled("discernment")).rows, tokenizer, which="target", length=LENGTH, target="discernment", dimensions=()
    )
    batches, step = stream(data, rows=2, seed=0), Stepper(policy, sft())
    step(next(batches))
    useful, began = 0, time.perf_counter()
    for _ in range(ROUNDS):
        batch = next(batches)
        step(batch)
        useful += int((batch.segments > 0).sum())
    return {"tokens_per_second": useful / (time.perf_counter() - began), "peak_mb": peak_mb()}


LENGTH = 512


def ours_objectives() -> dict:
    """Interleaved steps: dpo and efe against sft on the same tokens, K = 4 in a tree or in four rows, zero edits."""
    import jax
    import jax.numpy as jnp

    from aif.batches import build, stream
    from aif.corpus import bundled, load_scale, read
    from aif.objectives import Objective
    from aif.objectives.dpo import preference, reference_logprobs
    from aif.objectives.efe import efe
    from aif.objectives.sft import sft
    from aif.readers.ratings import ratings
    from aif.steering import add

    policy, tokenizer = model()
    names = [d.id for d in load_scale("nexus").dimensions]
    rows = read(bundled("discernment")).rows
    offline = efe(ratings(len(names), 4), jnp.full((len(names), 4), -jnp.log(4.0)))
    steps: dict[str, Callable[[], float]] = {}
    for which, objective in (("pair", preference()), ("all", offline)):
        data = build(rows, tokenizer, which=which, length=768, target="discernment", dimensions=names)
        batch = next(stream(data, rows=1, seed=0))
        facts = jax.jit(objective.prepare)(policy, batch, jax.random.key(0))
        batch = batch._replace(extras={**batch.extras, **facts})
        mine, plain = Stepper(policy, objective), Stepper(policy, sft())
        steps[objective.name] = lambda step=mine, b=batch: step(b)
        steps[f"sft on {which}"] = lambda step=plain, b=batch: step(b)
    zero = add(
        jnp.ones((policy.config.layers, policy.config.width)), jnp.zeros(1), jnp.ones(policy.config.layers), layers=[15]
    )
    steered = Stepper(policy.replace(edits=zero), sft())
    steps["sft on all, zero edits"] = lambda: steered(batch)
    scores = Objective(sft().loss, prepare=reference_logprobs)
    tree = build(rows[:1], tokenizer, which="all", length=768, target="discernment")
    flat = build([_alone(rows[0], k) for k in range(4)], tokenizer, which="target", length=768, target="discernment")
    score = jax.jit(scores.prepare)
    from aif.batches import once

    one, four = next(once(tree, rows=1)), next(once(flat, rows=4))
    steps["K = 4 in a tree"] = lambda: score(policy, one, jax.random.key(0))["reference_logps"].block_until_ready()
    steps["K = 4 apart"] = lambda: score(policy, four, jax.random.key(0))["reference_logps"].block_until_ready()
    for run in steps.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            seconds[name].append(timed(run))
    return {name: statistics.median(s) for name, s in seconds.items()}


def _alone(row, k: int):
    from dataclasses import replace

    return replace(row, candidates=(row.candidates[k],))


def ours_compile() -> dict:
    """Seconds of the first step's compilation, traced apart."""
    from aif.objectives.sft import sft
    from aif.train import train_step

    policy, _ = model()
    batch, step = random_batch(4, 256, policy.config.vocab), Stepper(policy, sft())
    import jax
    import numpy as np

    stack = jax.tree.map(lambda x: np.asarray(x)[None], batch)
    began = time.perf_counter()
    train_step.lower(step.state, policy, stack, step.loss, step.values, full=False).compile()
    return {"compile": time.perf_counter() - began}


def spawn(command: list[str], **environment: str) -> dict:
    """The JSON line that a measurement prints last."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(name: str, **environment: str) -> dict:
    return spawn([sys.executable, __file__, "--one", name], **environment)


def median_of(results: list[dict], key: str) -> float:
    return statistics.median(r[key] for r in results)


def alternate(repeats: int, *measurements: Callable[[], dict]) -> list[list[dict]]:
    """Each measurement `repeats` times, taking turns."""
    found: list[list[dict]] = [[] for _ in measurements]
    for _ in range(repeats):
        for results, measure in zip(found, measurements, strict=True):
            results.append(measure())
    return found


def row(what: str, mine: str, other: str = "", ratio: str = "") -> None:
    print(f"| {what} | {mine} | {other} | {ratio} |", flush=True)


def bench_step(
    peer: Path, folder: Path, repeats: int, *, what="LoRA step 4 x 256, torch eager + peft", name="step", flags=()
) -> None:
    command = [str(peer), str(HERE / "peers" / "torch_step.py"), "--model", str(folder), *flags]
    mine, torch = alternate(repeats, lambda: ours(name), lambda: spawn(command))
    a, b = median_of(mine, "tokens_per_second"), median_of(torch, "tokens_per_second")
    row(f"{what}, tokens/s", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}")
    a, b = median_of(mine, "peak_mb"), median_of(torch, "peak_memory_mb")
    row("the same, peak memory, MB", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}")


def bench_corpus(peer: Path, folder: Path, repeats: int) -> None:
    from aif.corpus import bundled, read

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "rows.jsonl")
        with data.open("w") as file:
            for r in read(bundled("discernment")).rows:
                answer = next(c.content for c in r.candidates if c.stance == "discernment")
                turns = [{"role": m.role, "content": m.content} for m in r.prompt]
                file.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": answer}]}) + "\n")
        command = [str(peer), str(HERE / "peers" / "trl_sft.py"), "--model", str(folder), "--data", str(data)]
        mine, trl = alternate(repeats, lambda: ours("corpus"), lambda: spawn([*command, "--max-steps", str(ROUNDS)]))
    a, b = median_of(mine, "tokens_per_second"), median_of(trl, "useful_tokens_per_second_warm")
    row("SFT over the corpus, TRL SFTTrainer, useful tokens/s", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}")


def bench_objectives(peer: Path, folder: Path, repeats: int) -> None:
    (found,) = alternate(repeats, lambda: ours("objectives"))
    for what, than in (
        ("dpo", "sft on pair"),
        ("efe", "sft on all"),
        ("sft on all, zero edits", "sft on all"),
        ("K = 4 in a tree", "K = 4 apart"),
    ):
        ratio = statistics.median(r[what] / r[than] for r in found)
        row(
            f"{what}, against {than}, s",
            f"{median_of(found, what):.3f}",
            f"{median_of(found, than):.3f}",
            f"{ratio:.3f}",
        )


def bench_compile(peer: Path, folder: Path, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (ours("compile", JAX_COMPILATION_CACHE_DIR=cache) for _ in range(2))
    row("compile of the step, s (cold, then from the cache)", f"{cold['compile']:.1f}", f"{warm['compile']:.2f}")


def bench_import(peer: Path, folder: Path, repeats: int) -> None:
    command = [sys.executable, "-m", "aif.cli", "--help"]
    run = lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)  # noqa: E731
    row("`aif --help`, s", f"{median_seconds(run):.2f}")


BENCHES = {
    "step": bench_step,
    "compiled": partial(bench_step, what="LoRA step 4 x 256, torch.compile + peft", flags=("--compile",)),
    "full": partial(bench_step, what="full step 4 x 256, torch eager", name="full", flags=("--full",)),
    "corpus": bench_corpus,
    "objectives": bench_objectives,
    "compile": bench_compile,
    "import": bench_import,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, help="the interpreter of an environment with peers/requirements.txt")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".bench" / MODEL, help="where torch's weights go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default=",".join(name for name in BENCHES if name != "compiled"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        from aif.__main__ import with_huge_pages

        with_huge_pages()  # as the command line does
        print(json.dumps(globals()[f"ours_{args.one}"]()))
        return
    chosen = args.only.split(",")
    if {"step", "compiled", "full", "corpus"} & {*chosen} and not args.folder.exists():
        from aif.models.hub import fetch

        make = str(HERE / "peers" / "make_hf_folder.py")
        spawn([str(args.torch), make, "--gguf", str(fetch(MODEL)), "--out", str(args.folder)])
    print("| what | aif | other | ratio |\n|---|---|---|---|", flush=True)
    for name in chosen:
        BENCHES[name](args.torch, args.folder, args.repeats)


if __name__ == "__main__":
    main()
