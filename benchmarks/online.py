"""Online expected free energy on the real model: terms on held-out prompts before and after.

    python benchmarks/online.py configs/online.yaml --arm efe --out runs/online

The policy samples answers to held-out prompts with the same keys before and after; readers and preferences are those of
the training run. F, U, I_s and the KL to the habit are means over answers, with a paired bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aif.api import load_config
from aif.experiment import Experiment
from aif.log import Progress
from aif.rollouts import prompts_of, roll
from aif.sources import with_facts

TERMS = ("free_energy", "pragmatic", "state_gain", "parameter_gain", "kl_habit")


def measured(objective: Any, policy: Any, reference: Any, prompts: Any, rounds: int) -> dict[str, np.ndarray]:
    """Every term per prompt `[prompts]`, mean over its samples."""
    found: dict[str, list[float]] = {name: [] for name in TERMS}
    loss = jax.jit(objective.loss)
    for number in range(len(prompts.ids)):
        parts: dict[str, list[float]] = {name: [] for name in TERMS}
        for turn in range(rounds):
            key = jax.random.fold_in(jax.random.key(turn), number)
            batch, answers = roll(policy, prompts, [number], objective.rollouts, key)
            terms = loss(policy, with_facts(batch, answers, objective, reference, key)).terms
            for name in TERMS:
                parts[name].append(float(terms[name].value))
        for name in TERMS:
            found[name].append(float(np.mean(parts[name])))
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--arm", default="efe")
    parser.add_argument("--out", type=Path, default=Path("runs/online"))
    parser.add_argument("--rounds", type=int, default=2, help="rollouts per held-out prompt")
    args = parser.parse_args()
    config = load_config(args.config)
    e, seed = Experiment(config), config.seed
    began = time.monotonic()
    with Progress(every=4) as progress:
        assert config.start is not None
        start = e.train(
            config.start, e.fresh(seed), seed=seed, name="start", folder=args.out / "start", progress=progress
        )
        reference = e.reference(start.trainable)
        objective = e.objective(config.arms[args.arm], reference)
        prompts = prompts_of(e.rows(config.corpus.heldout), e.lm.tokenizer)
        before = measured(objective, reference.replace(remat="none"), reference, prompts, args.rounds)
        arm = {"seed": seed, "name": args.arm, "folder": args.out / args.arm, "progress": progress}
        trained = e.train(config.arms[args.arm], start.trainable, objective=objective, **arm)
        policy = e.reference(trained.trainable).replace(remat="none")
        after = measured(objective, policy, reference, prompts, args.rounds)
    rng = np.random.default_rng(0)
    n = len(prompts.ids)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=4000) / n
    print(f"{args.arm}: {len(trained.lines)} updates, {time.monotonic() - began:.0f} s in all, {n} held-out prompts\n")
    print("| term, nats | before | after | change [95 %] |")
    print("|---|---|---|---|")
    for name in TERMS:
        change = after[name] - before[name]
        low, high = np.percentile(draws @ change, [2.5, 97.5])
        interval = f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"| {name} | {before[name].mean():.3f} | {after[name].mean():.3f} | {interval} |")
    lines = [{k: line[k] for k in ("step", *TERMS, "entropy", "length", "seconds")} for line in trained.lines]
    (args.out / f"{args.arm}.json").write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
