"""Time of the three basin metrics of one LoRA solution on SmolLM2-135M, beside the same loop written plainly in torch.

    python benchmarks/basins.py --torch .venv-torch/bin/python              # a few passes of each, taking turns
    python benchmarks/basins.py --full [--dtype bfloat16]                   # ours alone, at full size

Full size: 10 noise seeds x 12 eps, 10 norms, 64 rows of at most 128 tokens, 32 texts of 256 tokens, a random twin
beside the solution. The adapter, rank 16 on every linear layer, is Gaussian, as time does not depend on its values; at
full size it has been trained for a few steps on the rows, as stability is not measured where nothing was gained. Losses
and KL at the same norms are compared too, so that both sides are known to compute the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from step_time import HERE, MODEL, spawn

ROWS, TOKENS, TEXTS, TEXT_TOKENS, ALPHA = 64, 128, 32, 256, 32.0


def problem(rows: int = ROWS, dtype: str = "float32"):
    """The bench: model, a Gaussian adapter, rows cut to TOKENS tokens."""
    import jax
    import jax.numpy as jnp

    import aif
    from aif.adapter import lora, random_like, to_norm
    from aif.basins import Bench, Subject
    from aif.batches import build
    from aif.corpus import bundled, read
    from aif.runtime import compilation_cache

    compilation_cache()
    lm = aif.load(MODEL)
    fresh = lora(lm.config, rank=16, alpha=ALPHA, key=jax.random.key(0))
    ones = {name: {**part, "b": part["b"] + 1.0} for name, part in fresh.items()}
    adapter = to_norm(random_like(ones, jax.random.key(1)), 4.0)
    cut = [_cut(lm.tokenizer, row) for row in read(bundled("discernment")).rows[:rows]]
    data = build(cut, lm.tokenizer, which="target", length=TOKENS, target="discernment")
    return Bench(
        base=aif.bind(lm, compute_dtype=jnp.dtype(dtype)),
        subjects=[Subject("solution", adapter)],
        target=data,
        alternatives=data,
        alternatives_elsewhere=data,
        tokenizer=lm.tokenizer,
        rows=16,
        key=jax.random.key(0),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )


def trained(bench):
    """The bench, whose solution gains on its rows."""
    import jax

    from aif.adapter import lora
    from aif.objectives.sft import sft
    from aif.train import Optimizer, Settings, stage

    fresh = lora(bench.base.config, rank=16, alpha=ALPHA, key=jax.random.key(0))
    settings = Settings(steps=8, rows=8, optimizer=Optimizer(learning_rate=5e-4, schedule="constant", warmup=0))
    found = stage(bench.base, fresh, sft(), bench.target, settings)
    return replace(bench, subjects=[replace(bench.subjects[0], adapter=found.trainable)])


def _cut(tokenizer, row):
    """The row with its target answer cut to whole words that fit."""
    from aif.tokens import encode

    best = next(c for c in row.candidates if c.stance == "discernment")
    words = best.content.split()
    while words:
        short = replace(row, candidates=(replace(best, content=" ".join(words)),))
        if len(encode(tokenizer, short, [0], 4096).tokens) <= TOKENS:
            return short
        words = words[:-4]
    raise SystemExit(f"{row.id}: its prompt alone is longer than {TOKENS} tokens")


def written(bench, path: Path, count: int) -> None:
    """What torch needs: token ids with the scored ones marked, texts, the adapter."""
    from aif.basins.significance import Options, text_data

    texts = text_data(bench, Options(texts=count, tokens=TEXT_TOKENS))
    scored = []
    for example in bench.target.examples:
        mask = np.zeros(len(example["tokens"]), np.int32)
        mask[example["index"] + 1] = 1
        scored.append(mask)
    arrays = {f"{n}.{k}": np.asarray(part[k]) for n, part in bench.subjects[0].adapter.items() for k in ("a", "b")}
    np.savez(
        path,
        alpha=ALPHA,
        tokens=np.concatenate([e["tokens"] for e in bench.target.examples]),
        scored=np.concatenate(scored),
        lengths=[len(e["tokens"]) for e in bench.target.examples],
        texts=np.concatenate([e["tokens"] for e in texts.examples]),
        text_lengths=[len(e["tokens"]) for e in texts.examples],
        **arrays,
    )


def ours(bench, factors: list[float], eps: list[float], noise_seeds: int, controls: int) -> dict:
    """Seconds (wall, processor) of each metric, and its curve. A first run of the same shapes compiles."""
    from aif.basins import efficiency, significance, stability

    plans = {
        "efficiency": lambda: efficiency.measure(bench, efficiency.Options(factors=factors, controls=controls)),
        "stability": lambda: stability.measure(bench, stability.Options(eps=eps, noise_seeds=noise_seeds)),
        "significance": lambda: significance.measure(
            bench, significance.Options(factors=factors, texts=TEXTS, tokens=TEXT_TOKENS, controls=controls)
        ),
    }
    out: dict = {"seconds": {}, "cpu_seconds": {}, "found": {}}
    for name, run in plans.items():
        began, used = time.perf_counter(), time.process_time()
        measured = run()
        out["seconds"][name] = time.perf_counter() - began
        out["cpu_seconds"][name] = time.process_time() - used
        curves = [m for m in measured if m.x and m.subject == "solution"]
        out["found"][name] = np.asarray(curves[0].value(np.ones(curves[0].rows))).tolist() if curves else []
    return out


FACTORS, EPS = [1.0], [0.5]
# at full size: 10 norms of solution and twin, and the base; 10 x 12 noise levels, solution and base; 20 points, where a
# pass of significance reads the base too
PASSES = {"efficiency": 21, "stability": 122, "significance": 10.5}


def one_pass(path: Path, rows: int, count: int) -> dict:
    """Seconds of one pass of each metric, compiled before, over FACTORS or EPS."""
    import jax
    import jax.numpy as jnp
    from jax.tree_util import Partial

    from aif.adapter import effective_norm
    from aif.basins.norms import at_norm
    from aif.basins.scoring import grid_divergences, grid_losses
    from aif.basins.significance import Options, text_data
    from aif.basins.stability import perturb

    bench = problem(rows)
    written(bench, path, count)
    subject, texts = bench.subjects[0], text_data(bench, Options(texts=count, tokens=TEXT_TOKENS))
    norms = jnp.float32(FACTORS) * effective_norm(subject.adapter)
    noise = Partial(perturb, subject.adapter, jax.random.key(0))
    how = {"rows": bench.rows}
    runs = {
        "efficiency": lambda: grid_losses(bench.base, at_norm(subject), norms, bench.target, **how),
        "stability": lambda: grid_losses(bench.base, noise, jnp.float32(EPS), bench.target, **how),
        "significance": lambda: grid_divergences(bench.base, [at_norm(subject)], [norms], texts, **how),
    }
    out: dict = {"seconds": {}, "cpu_seconds": {}, "found": {}}
    for name, run in runs.items():
        run()
        began, used = time.perf_counter(), time.process_time()
        sums, tokens = run()
        out["seconds"][name] = (time.perf_counter() - began) / len(FACTORS)
        out["cpu_seconds"][name] = (time.process_time() - used) / len(FACTORS)
        sums = sums[0] if isinstance(sums, list) else sums
        out["found"][name] = (sums.sum(axis=0) / tokens.sum()).tolist()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, help="the interpreter of an environment with peers/requirements.txt")
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".bench" / MODEL, help="where torch's weights go")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--full", action="store_true", help="ours alone, at full size, compilation included")
    parser.add_argument("--dtype", default="float32", help="what --full computes in: float32 or bfloat16")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one or args.full:
        from aif.__main__ import with_huge_pages

        with_huge_pages()  # as the command line does
    if args.one:
        print(json.dumps(one_pass(args.one, args.rows, args.texts)))
    elif args.full:
        from aif.basins import efficiency, stability

        norms = efficiency.Options().factors  # pyright: ignore[reportCallIssue]
        found = ours(trained(problem(dtype=args.dtype)), norms, stability.Options().eps, 10, 1)  # pyright: ignore[reportCallIssue]
        print(json.dumps(found | {"total_seconds": sum(found["seconds"].values())}))
    else:
        beside(args)


def beside(args: argparse.Namespace) -> None:
    """Both sides in turn, and their ratios of wall and of processor seconds."""
    if not args.folder.exists():
        from aif.models.hub import fetch

        spawn(
            [
                str(args.torch),
                str(HERE / "peers" / "make_hf_folder.py"),
                "--gguf",
                str(fetch(MODEL)),
                "--out",
                str(args.folder),
            ]
        )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "problem.npz")
        numbers = lambda values: [str(v) for v in values]  # noqa: E731
        command = [str(args.torch), str(HERE / "peers" / "torch_basins.py"), "--model", str(args.folder)]
        command += ["--problem", str(path), "--eps", *numbers(EPS), "--factors", *numbers(FACTORS)]
        sizes = ["--rows", str(args.rows), "--texts", str(args.texts)]
        pairs = []
        for _ in range(args.repeats):
            mine = spawn([sys.executable, __file__, "--one", str(path), *sizes])
            pairs.append((mine, spawn(command)))
            print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    print(
        "| one pass | aif, s | torch, s | ratio | ratio of processor seconds | largest difference |\n"
        + "|---" * 6
        + "|"
    )
    totals = [
        sum(PASSES[name] * statistics.median(p[k]["seconds"][name] for p in pairs) for name in PASSES) for k in (0, 1)
    ]
    for name in PASSES:
        a, b = (statistics.median(p[k]["seconds"][name] for p in pairs) for k in (0, 1))
        cpu = statistics.median(t["cpu_seconds"][name] / m["cpu_seconds"][name] for m, t in pairs)
        off = np.abs(np.subtract(pairs[0][0]["found"][name], pairs[0][1]["found"][name])).max()
        same = "-" if name == "stability" else f"{off:.1e}"  # noise is drawn by each side's own generator
        print(f"| {name} | {a:.2f} | {b:.2f} | {b / a:.2f} | {cpu:.2f} | {same} |")
    a, b = totals
    print(f"| all three, as many passes as at full size (computed) | {a:.0f} | {b:.0f} | {b / a:.2f} | | |")


if __name__ == "__main__":
    main()
