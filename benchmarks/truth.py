"""Truth directions on statements that nobody here wrote: readable at which layer, shared by two sets, and used?

python benchmarks/truth.py --cities cities.csv --translations sp_en_trans.csv [--pairs 240] [--causal 120]

The files are those of Marks & Tegmark 2024 (The Geometry of Truth): columns `statement` and `label` (1 is true). Each
statement is read as raw text; the residual is that of its last token, the full stop. A prompt is what a true and a
false statement begin with ("The city of Lyon is in"): folds never split a city or a word, log-odds compare two ends.
"""

from __future__ import annotations

import argparse
import csv
import re
import time
from pathlib import Path

import numpy as np

import aif
from aif.batches import from_trees
from aif.directions import mean_difference, probe, response_means
from aif.directions.causal import comparable
from aif.directions.layers import layer_map, logistic_vectors, mean_vectors, part
from aif.directions.linear import fit_linear
from aif.directions.readable import auroc
from aif.errors import BadInput
from aif.policy import bind
from aif.runtime import compilation_cache
from aif.statistics import bounds
from aif.tokens import tree

START = re.compile(r"^(The city of .+? is in|The Spanish word '.+?' means) (.+)$")


def statements(path: Path, limit: int | None) -> dict[str, list[tuple[str, bool]]]:
    """Beginning -> its endings with their labels, in the order of the file.

    Raises:
      BadInput: a line is no statement of the two sets, or a label is not 0 or 1.
    """
    found: dict[str, list[tuple[str, bool]]] = {}
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            match = START.match(row.get("statement") or "")
            if not match or row.get("label") not in ("0", "1"):
                raise BadInput(
                    f"{path}:{number}: no statement of this set with a label 0 or 1; give cities or sp_en_trans"
                )
            found.setdefault(match[1], []).append((" " + match[2], row["label"] == "1"))
    return dict(list(found.items())[:limit])


def encoded(lm, found: dict[str, list[tuple[str, bool]]], length: int = 256):
    """A data set with a tree per beginning, and which statement is true."""
    ids = lambda text: lm.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    trees = [tree(ids(start), [ids(end) for end, _ in ends]) for start, ends in found.items()]
    owners = [(row, k) for row, ends in enumerate(found.values()) for k in range(len(ends))]
    true = np.array([label for ends in found.values() for _, label in ends])
    return from_trees(trees, {}, owners, length=length), true


def readable(name: str, seen, true: np.ndarray, prompts: np.ndarray, layers: list[int]) -> None:
    """Held-out accuracy per layer of the logistic probe, its control, and of the mean difference."""
    _, found = probe(seen, true, prompts, layers=layers)
    print(f"\n### {name}: {len(true)} statements, {true.mean():.0%} true, {len(np.unique(prompts))} beginnings\n")
    print("| layer | logistic accuracy | shuffled labels | selectivity | split-half cosine | mean difference AUROC |")
    print("|---|---|---|---|---|---|")
    for r in found:
        value, low, high = held_out_auroc(seen.means[:, r.layer], true, prompts)
        selectivity = f"{r.selectivity:+.3f} [{r.selectivity_low:+.3f}, {r.selectivity_high:+.3f}]"
        print(f"| {r.layer} | {r.accuracy:.3f} [{r.low:.3f}, {r.high:.3f}] | {r.control:.3f} | {selectivity} ", end="")
        print(f"| {r.split_half:+.2f} | {value:.3f} [{low:.3f}, {high:.3f}] |")


def held_out_auroc(x: np.ndarray, true: np.ndarray, prompts: np.ndarray, folds: int = 5) -> tuple[float, float, float]:
    """AUROC along the mean difference of the other folds."""
    fold = np.unique(prompts, return_inverse=True)[1] % folds
    score = np.zeros(len(true))
    for k in range(folds):
        on = fold != k
        v = x[on & true].mean(axis=0) - x[on & ~true].mean(axis=0)
        score[fold == k] = (x[fold == k] - x[on].mean(axis=0)) @ v
    return over_prompts(score, true, prompts)


def over_prompts(score: np.ndarray, true: np.ndarray, prompts: np.ndarray) -> tuple[float, float, float]:
    """AUROC and its 95 % bootstrap interval over prompts."""
    number = np.unique(prompts, return_inverse=True)[1]
    members = [np.flatnonzero(number == k) for k in range(number.max() + 1)]
    generator = np.random.default_rng(0)
    picks = [generator.integers(len(members), size=len(members)) for _ in range(400)]
    drawn = [np.concatenate([members[k] for k in pick]) for pick in picks]
    low, high = bounds(np.array([auroc(score[r], true[r]) for r in drawn]))
    return auroc(score, true), float(low), float(high)


def transfer(sets: dict, layers: list[int]) -> None:
    """AUROC on one set along directions of the other, and the cosine between the two sets' own directions."""
    print("\n### From one set to the other\n")
    names = list(sets)
    print("| layer | kind | cosine | " + " | ".join(f"{a} -> {b}" for a, b in (names, names[::-1])) + " |")
    print("|---|---|---|---|---|")
    for layer in layers:
        for kind in ("mean difference", "logistic"):
            vectors = {name: direction(kind, seen, true, layer) for name, (seen, true, _) in sets.items()}
            one, two = vectors.values()
            cells = []
            for a, b in (names, names[::-1]):
                seen, true, prompts = sets[b]
                value, low, high = over_prompts(seen.means[:, layer] @ vectors[a], true, prompts)
                cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]")
            cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
            print(f"| {layer} | {kind} | {cosine:+.2f} | " + " | ".join(cells) + " |")


def direction(kind: str, seen, true: np.ndarray, layer: int) -> np.ndarray:
    if kind == "mean difference":
        return np.asarray(mean_difference(seen, true).vector[layer])
    x, labels, ones = seen.means[:, layer].astype(float), true[:, None].astype(int), np.ones((len(true), 1))
    return fit_linear(x, labels, ones, method="logistic", strength=100.0)[0][:, 0]


def causal(name: str, policy, data, true: np.ndarray, seen, layers: list[int], doses: list[float], limit: int) -> None:
    """Do the directions move true-minus-false log-odds and an independent reader? The rule is in docs/directions.md."""
    some, on = comparable(data, true)
    some = some.some(limit)
    on &= np.isin(data.prompts, some.prompts)
    print(f"\n### {name}: what steering moves ({limit} beginnings: a third each for direction, reader and test)\n")
    print(
        f"Log-odds of true over false, nats per token, at doses {', '.join(f'{d:g}' for d in doses)} residual norms.\n"
    )
    print("| layer | kind | verdict (prompts) | passed | log-odds | their rise | rise of the reading, logits ", end="")
    print("| share of the reader's gap that ablation takes | log-odds ablated |\n|---|---|---|---|---|---|---|---|---|")
    for kind, make in (("mean difference", mean_vectors), ("logistic", logistic_vectors)):
        options = {"layers": layers, "make": make, "doses": doses, "rows": 4, "pool": "last"}
        for v in layer_map(policy, some, true[on], activations=part(seen, on), **options):
            odds = ", ".join(f"{i.value:.3f}" for i in v.log_odds)
            passed = ", ".join(k for k, ok in v.passed.items() if ok) or "-"
            print(
                f"| {v.layer} | {kind} | {v.verdict} ({v.prompts}) | {passed} | {odds} | {v.log_odds_rise} "
                f"(random {v.log_odds_random:.3f}) | {v.reading_rise} (random {v.reading_random:.3f}) "
                f"| {v.removed} (random {v.removed_random:.3f}) | {v.log_odds_ablated} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cities", type=Path, required=True)
    parser.add_argument("--translations", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=240, help="beginnings of each set that are read")
    parser.add_argument(
        "--causal", type=int, default=120, help="of those, how many the causal part splits in three; 0 leaves it out"
    )
    parser.add_argument("--every", type=int, default=3, help="layers are read in steps of so many")
    parser.add_argument("--steer-at", type=int, nargs="*", help="layers of the causal part; three when left out")
    parser.add_argument("--doses", type=float, nargs="*", default=[-2.0, -1.0, 0.0, 1.0, 2.0], help="residual norms")
    parser.add_argument("--model", default="smollm2-135m")
    args = parser.parse_args()
    began = time.monotonic()
    compilation_cache()
    lm = aif.load(args.model)
    policy, last = bind(lm), lm.config.layers - 1
    layers = list(range(args.every - 1, last + 1, args.every))
    sets, kept = {}, {}
    for name, path in (("cities", args.cities), ("translations", args.translations)):
        data, true = encoded(lm, statements(path, args.pairs))
        seen = response_means(policy, data, rows=4, pool="last")
        sets[name], kept[name] = (seen, true, data.prompts), data
        readable(name, seen, true, data.prompts, layers)
    transfer(sets, layers)
    if args.causal:
        seen, true, _ = sets["cities"]
        chosen = args.steer_at or [layers[k * len(layers) // 4] for k in (1, 2, 3)]
        causal("cities", policy, kept["cities"], true, seen, chosen, args.doses, args.causal)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
