"""Objectives side by side: the arms of a config timed in turns, their memory, and the tokens to a target loss.

    python benchmarks/objectives.py configs/study.yaml [key=value ...] [--only time,target] [--rounds 3] [--json FILE]

    time    seconds of a step, of making its batch (sampling and preparing, where an arm samples) and of preparing the
            data set once; the tokens of a step; what the compiled step holds: its arguments, results and temporaries
    target  from a fresh adapter, the arm's steps twice, at a constant learning rate. The target is 80 % of what the
            first arm gains in its steps, in nats per token of the held-out target answers

Objectives, data and optimizer of an arm are those of the config's own run; the shared stage is left out, so that all
start from the base model, which is also the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from aif.api import load_config
from aif.batches import Dataset
from aif.experiment import Experiment
from aif.objectives import Objective
from aif.objectives.logprobs import scores
from aif.sources import Offline, Online, tokens_of
from aif.train import Settings, attach, prepared, start_state, train_step
from aif.types import Batch, State, as_partial

GAIN = 0.8  # share of the first arm's gain that is the target
EVERY = 2  # steps between looks at the held-out loss


@dataclass
class Arm:
    """An arm of the config with its training state."""

    name: str
    objective: Objective
    source: Offline | Online
    settings: Settings
    state: State
    steps: int
    preparing: float  # seconds
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "batch": []})

    def draw(self, e: Experiment) -> Batch:
        """The micro-batches of the next step."""
        policy = attach(e.base, self.state.trainable, self.settings.full)
        return self.source(policy, int(self.state.step))

    def arguments(self, e: Experiment, stack: Batch) -> tuple:
        return self.state, e.base, stack, as_partial(self.objective.loss), self.settings.optimizer.values(0, 1)

    def step(self, e: Experiment, stack: Batch) -> None:
        self.state, log = train_step(*self.arguments(e, stack), full=self.settings.full)
        jax.block_until_ready(log)

    def megabytes(self, e: Experiment, stack: Batch) -> float:
        """What the compiled step holds at most; results that take the place of arguments count once."""
        held = train_step.lower(*self.arguments(e, stack), full=self.settings.full).compile().memory_analysis()
        assert held is not None
        inside = held.argument_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes
        return (inside + held.temp_size_in_bytes) / 1e6


def arm_of(e: Experiment, name: str) -> Arm:
    spec = e.config.arms[name]
    settings = e.settings(spec, e.config.seed)
    settings = replace(settings, optimizer=replace(settings.optimizer, schedule="constant", warmup=0))
    began = time.perf_counter()
    objective = e.objective(spec, e.base)
    data = e.examples(objective, None)
    if isinstance(data, Dataset):
        data = prepared(objective, e.base, data, rows=settings.rows, key=jax.random.key(settings.seed))
    preparing = time.perf_counter() - began
    kind: Any = Offline if isinstance(data, Dataset) else Online
    how = {"rows": settings.rows, "accumulate": settings.accumulate, "seed": settings.seed, "position": None}
    state = start_state(e.fresh(settings.seed), jax.random.key(settings.seed))
    return Arm(name, objective, kind(data, objective, e.base, **how), settings, state, settings.steps, preparing)


def time_arms(e: Experiment, arms: list[Arm], rounds: int) -> list[dict]:
    """A record per arm: medians over rounds in which every arm makes a batch and a step."""
    about = {}
    for arm in arms:
        stack = arm.draw(e)
        about[arm.name] = {"tokens": tokens_of(stack), "memory_mb": arm.megabytes(e, stack)}
        arm.step(e, stack)
    for _ in range(rounds):
        for arm in arms:
            began = time.perf_counter()
            stack = arm.draw(e)
            between = time.perf_counter()
            arm.step(e, stack)
            arm.seconds["batch"].append(between - began)
            arm.seconds["step"].append(time.perf_counter() - between)
    records = []
    for arm in arms:
        pairs = zip(arm.seconds["step"], arms[0].seconds["step"], strict=True)
        middle = {name: statistics.median(s) for name, s in arm.seconds.items()}
        ratio = statistics.median(mine / first for mine, first in pairs)
        records.append({"arm": arm.name, **middle, "ratio": ratio, "preparing": arm.preparing, **about[arm.name]})
    return records


def tokens_to_target(e: Experiment, arms: list[Arm]) -> list[dict]:
    """A record per arm: held-out loss against tokens, and where it first reaches the target."""
    heldout = e.data("target", e.config.corpus.heldout)
    count = sum(len(example["targets"]) for example in heldout.examples)

    def loss(trainable: Any, full: bool) -> float:
        policy = attach(e.base, trainable, full).replace(remat="none")
        return float(-scores(policy, heldout, rows=e.config.batch.rows).sum() / count)

    records, target = [], float("nan")
    for arm in arms:
        tokens, curve = 0, [(0, loss(arm.state.trainable, arm.settings.full))]
        for number in range(2 * arm.steps):
            stack = arm.draw(e)
            arm.step(e, stack)
            tokens += tokens_of(stack)
            if (number + 1) % EVERY == 0:
                curve.append((tokens, loss(arm.state.trainable, arm.settings.full)))
        if not records:
            target = curve[0][1] - GAIN * (curve[0][1] - curve[arm.steps // EVERY][1])
        reached = next((t for t, x in curve if x <= target), None)
        best = min(x for _, x in curve)
        records.append({"arm": arm.name, "target": target, "tokens": reached, "lowest": best, "curve": curve})
        print(f"{arm.name}: {' '.join(f'{x:.3f}' for _, x in curve)}", flush=True)
    return records


def show_times(records: list[dict]) -> None:
    print("| arm | step, s | against the first | batch, s | preparing, s | tokens a step | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for r in records:
        times = f"{r['step']:.2f} | {r['ratio']:.2f} | {r['batch']:.2f} | {r['preparing']:.1f}"
        print(f"| {r['arm']} | {times} | {r['tokens']} | {r['memory_mb']:.0f} |")


def show_targets(records: list[dict]) -> None:
    print(f"\nheld-out loss before {records[0]['curve'][0][1]:.3f}, target {records[0]['target']:.3f} nats per token\n")
    print("| arm | tokens to the target | tokens in all | lowest loss | last loss |\n|---|---|---|---|---|")
    for r in records:
        last = r["curve"][-1]
        reached = "not reached" if r["tokens"] is None else r["tokens"]
        print(f"| {r['arm']} | {reached} | {last[0]} | {r['lowest']:.3f} | {last[1]:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--only", default="time,target")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the records are written")
    args = parser.parse_args()
    e = Experiment(load_config(args.config, args.overrides))
    arms = [arm_of(e, name) for name in e.config.arms]
    found: dict[str, list[dict]] = {}
    if "time" in args.only.split(","):
        found["time"] = time_arms(e, arms, args.rounds)
        show_times(found["time"])
    if "target" in args.only.split(","):
        for arm in arms:  # timed steps have trained it
            arm.state = start_state(e.fresh(arm.settings.seed), jax.random.key(arm.settings.seed))
        found["target"] = tokens_to_target(e, arms)
        show_targets(found["target"])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
