"""The bundled corpus's stance and its 15 rated dimensions: which are linearly readable, which are functional?

python benchmarks/stance.py [--prompts 48] [--words 30] [--layer 14] [--model NAME]

Every answer is cut to its first words, so that none is told by its length. A rated dimension is high where an answer is
rated in the upper half of its levels. What is functional is tried with mean differences at one layer, at doses -2, -1,
0, 1 and 2, on a third of the prompts; directions and readers are made from the other two thirds. Only what reads there
(selectivity above zero, interval and all) is tried.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

import aif
from aif.batches import build, evenly
from aif.corpus import bundled, load_scale, read
from aif.directions import probe, response_means
from aif.directions.causal import blind_reader, mixed, thirds
from aif.directions.functional import Functional, Trial, controls, functional
from aif.directions.layers import mean_vectors, part, reader_layer
from aif.directions.record import units
from aif.policy import bind
from aif.runtime import compilation_cache
from aif.statistics import bounds, draws

DOSES = (-2.0, -1.0, 0.0, 1.0, 2.0)
TARGET = "discernment"
FEWEST = 6  # prompts with answers of both classes that a dimension is tried on


def shortened(prompts: int, words: int) -> list:
    """Rows with four answers to one question, evenly over the corpus, each answer cut to its first words."""
    rows = [r for r in read(bundled("discernment")).rows if len(r.candidates) == 4 and len(r.prompt) == 1]
    cut = lambda c: replace(c, content=" ".join(c.content.split()[:words]))  # noqa: E731
    chosen = [rows[k] for k in evenly(len(rows), min(prompts, len(rows)))]
    return [replace(r, candidates=tuple(cut(c) for c in r.candidates)) for r in chosen]


def readable(labels: dict[str, np.ndarray], seen, prompts: np.ndarray, layers: list[int]) -> list[str]:
    """Held-out accuracy of logistic probes at the layers, for the stance, and at the first of them for each dimension;
    the names of what is readable there."""
    selective = []
    print("\n| what | layer | high | accuracy | shuffled labels | selectivity | AUROC | split-half cosine |")
    print("|---|---|---|---|---|---|---|---|")
    for name, positive in labels.items():
        _, found = probe(seen, positive, prompts, layers=layers if name == TARGET else layers[:1])
        selective += [name] if found[0].selectivity_low > 0 else []
        for r in found:
            print(
                f"| {name} | {r.layer} | {positive.mean():.0%} | {r.accuracy:.2f} [{r.low:.2f}, {r.high:.2f}] "
                f"| {r.control:.2f} | {r.selectivity:+.2f} [{r.selectivity_low:+.2f}, {r.selectivity_high:+.2f}] "
                f"| {r.auroc:.2f} | {r.split_half:+.2f} |",
                flush=True,
            )
    return selective


def geometry(labels: dict[str, np.ndarray], seen, prompts: np.ndarray, layer: int, resamples: int = 500) -> None:
    """Cosines of the mean differences, and how many independent directions the dimensions amount to."""
    x, table = seen.means[:, layer].astype(float), np.stack(list(labels.values()), axis=1)
    cosine = cosines(x, table, np.ones(len(x)))
    floor = x.shape[1] ** -0.5
    print(
        f"\nCosines of mean differences at layer {layer}, in the order of the table (unrelated: +-{floor:.2f}):\n\n```"
    )
    for name, row in zip(labels, cosine, strict=True):
        print(f"{name:27s} " + " ".join(f"{value:+.1f}" for value in row))
    print("```")
    number = np.unique(prompts, return_inverse=True)[1]
    drawn = draws(number.max() + 1, resamples, 0)[:, number]  # a weight per answer
    low, high = bounds(np.array([participation(cosines(x, table, w)[1:, 1:]) for w in drawn]))
    share = participation(cosine[1:, 1:])
    print(f"\nparticipation ratio of the {len(labels) - 1} dimensions {share:.2f} [{low:.2f}, {high:.2f}]", flush=True)


def cosines(x: np.ndarray, table: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Between the weighted mean differences of the label sets in the columns of `table`."""
    sides = [(w[:, None] * side) / np.maximum((w[:, None] * side).sum(axis=0), 1e-9) for side in (table, ~table)]
    unit = units((sides[0] - sides[1]).T @ x)
    return unit @ unit.T


def participation(cosine: np.ndarray) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: 1 for one direction, n for n orthogonal ones."""
    sizes = np.linalg.eigvalsh(cosine)
    return float(np.square(sizes.sum()) / np.square(sizes).sum())


def tried(
    labels: dict[str, np.ndarray], names: list[str], policy, data, seen, layer: int, seed: int = 0
) -> dict[str, Functional]:
    """The verdict on every direction at one layer; base and random directions are run once for all of them."""
    prompts = data.prompts
    first, second, third = thirds(prompts, seed)
    number = np.unique(prompts, return_inverse=True)[1]
    whole = Trial(policy, data.only(np.unique(number[third]).tolist()), labels[TARGET][third], seen.norms, rows=4)
    base, random = whole.seen(), controls(whole, layer, ends=(DOSES[0], DOSES[-1]), seed=seed)
    later, found = reader_layer(layer, policy.config.layers), {}
    print(f"\nAt layer {layer}, read at layer {later}; log-odds in nats per token\n")
    print("| what | prompts | verdict | passed | log-odds at -2 ... 2 | their rise (random) ", end="")
    print("| rise of the reading (random) | share of the gap that ablation takes (random) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in names:
        positive = labels[name]
        on = mixed(whole.data.prompts, positive[third])
        tested = len(np.unique(whole.data.prompts[on]))
        if tested < FEWEST or not all(0.1 < positive[p].mean() < 0.9 for p in (first, second)):
            print(f"| {name} | {tested} | not tried: too few prompts with high and low answers | | | | | |")
            continue
        vector = mean_vectors(part(seen, first), positive[first])[layer]
        reader = blind_reader(part(seen, second), positive[second], vector, later)
        trial = replace(whole, positive=positive[third][on], counted=on)
        options = {"doses": DOSES, "base": base.only(on), "random": random.only(on)}
        v = functional(trial, vector, layer, reader, **options)
        print(line(name, v), flush=True)
        found[name] = v
    return found


def line(name: str, v: Functional) -> str:
    odds = ", ".join(f"{i.value:.2f}" for i in v.log_odds)
    passed = ", ".join(k for k, ok in v.passed.items() if ok) or "-"
    return (
        f"| {name} | {v.prompts} | {v.verdict} | {passed} | {odds} | {v.log_odds_rise} ({v.log_odds_random:.2g}) "
        f"| {v.reading_rise} ({v.reading_random:.2g}) | {v.removed} ({v.removed_random:.2g}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--words", type=int, default=30)
    parser.add_argument("--layer", type=int, default=14, help="where dimensions are read and directions are tried")
    parser.add_argument("--readable-only", action="store_true", help="leave out what needs steering")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    began = time.monotonic()
    compilation_cache()
    lm, scale = aif.load(args.model), load_scale("nexus")
    policy, names = bind(lm), [d.id for d in scale.dimensions]
    rows = shortened(args.prompts, args.words)
    data = build(rows, lm.tokenizer, which="all", length=512, target=TARGET, dimensions=names)
    high = data.tables["ratings"] >= len(scale.levels) / 2
    labels = {TARGET: data.tables["preference"] > 0} | {name: high[:, k] for k, name in enumerate(names)}
    seen = response_means(policy, data, rows=4)
    print(f"{len(rows)} prompts, {len(data.owners)} answers of {args.words} words")
    layers = [args.layer, *(l for l in range(2, lm.config.layers, 6) if l != args.layer)]
    selective = readable(labels, seen, data.prompts, layers)
    geometry(labels, seen, data.prompts, args.layer)
    if not args.readable_only:
        tried(labels, selective, policy, data, seen, args.layer)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
