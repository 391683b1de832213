"""Does coherence of a corpus, rather than its volume, select a direction? Effect on held-out domains against both.

    python benchmarks/coherence.py --out runs/coherence

At one count of tokens, corpora of decreasing coherence (target answers mixed with answers of other stances) and of
increasing volume at low coherence (more prompts, fewer passes) train the same adapter by SFT. Coherence is the mean
resultant length R of the trained answers against the other answers to the same prompts. The effect is the gain of the
target's log-odds over the other stances, nats per token, on domains that were never trained on; intervals are bootstrap
over prompts, paired across corpora, and over seeds.

Which basin is selected: the cosine of every solution with that of the pure corpus and with that of a corpus without any
target answer, over weight changes, resampled over weight matrices and seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aif.basins.generality import log_odds
from aif.basins.geometry import alignment, cosine
from aif.basins.scoring import losses
from aif.batches import build, evenly
from aif.checkpoint import load_arrays, save_arrays
from aif.config import check
from aif.corpus import Conversation
from aif.corpus.tiers import target_of
from aif.directions.activations import response_means
from aif.directions.coherence import measure, summary
from aif.experiment import Experiment
from aif.log import Progress
from aif.objectives.sft import sft
from aif.train import stage

RESAMPLES = 4000


class Mix(NamedTuple):
    """So many prompts, of which a share is answered by the target stance and the rest by the others in turn."""

    prompts: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.prompts} prompts, {self.share:.0%} target"


def mixed(rows: list[Conversation], mix: Mix, target: str, seed: int) -> tuple[list[Conversation], np.ndarray]:
    """The rows with one answer each, and which candidate it is."""
    rng = np.random.default_rng([seed, mix.prompts])
    some = [rows[k] for k in evenly(len(rows), mix.prompts)]
    order = rng.permutation(mix.prompts)
    liked = set(order[: round(mix.share * mix.prompts)].tolist())
    chosen = np.zeros(mix.prompts, int)
    for place, number in enumerate(order.tolist()):
        row = some[number]
        best = row.candidates.index(target_of(row, target))
        others = [k for k in range(len(row.candidates)) if k != best]
        chosen[number] = best if number in liked else others[place % len(others)]
    return [replace(r, candidates=(r.candidates[k],)) for r, k in zip(some, chosen, strict=True)], chosen


def coherence_of(e: Experiment, rows: list[Conversation], mixes: list[Mix], seeds: list[int]) -> dict[str, list[dict]]:
    """R with its null for every mix and seed, at the layer where the pure corpus stands out most."""
    data = build(rows, e.lm.tokenizer, which="all", length=2048, target=e.config.corpus.target)
    found = response_means(e.base.replace(remat="none"), data, rows=1).means
    table = {owner: found[k] for k, owner in enumerate(data.owners)}
    out: dict[str, list[dict]] = {}
    layer = 0
    for mix in sorted(mixes, key=lambda m: -m.share):
        places = evenly(len(rows), mix.prompts)
        for seed in seeds:
            _, chosen = mixed(rows, mix, e.config.corpus.target, seed)
            v = []
            for place, k in zip(places, chosen, strict=True):
                others = [table[place, j] for j in range(len(rows[place].candidates)) if j != k]
                v.append(table[place, k] - np.mean(others, axis=0))
            told = summary(measure(np.stack(v), [rows[k] for k in places]), [rows[k] for k in places])
            layer = told["layer"] if not out else layer
            out.setdefault(mix.name, []).append(told["layers"][layer])
    return out


def effects(e: Experiment, rows: list[Conversation], mixes: list[Mix], seeds: list[int], spec: Any, out: Path) -> dict:
    """Gain in log-odds per held-out prompt, `[seeds, prompts]`, of every mix; what is done already is kept."""
    c = e.config
    elsewhere = e.data("all", c.corpus.heldout_domain)
    file = out / "effects.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    before = log_odds(*losses(e.base.replace(remat="none"), elsewhere, rows=c.batch.rows), elsewhere)
    with Progress(every=100) as progress:
        for seed in seeds:
            for mix in mixes:
                key = f"{mix.name}, seed {seed}"
                if key in done:
                    continue
                began = time.monotonic()
                chosen, _ = mixed(rows, mix, c.corpus.target, seed)
                data = build(chosen, e.lm.tokenizer, which="target", length=c.batch.length, target="")
                trained = stage(e.base, e.fresh(seed), sft(), data, e.settings(spec, seed), progress=progress, name=key)
                policy = e.base.replace(adapter=trained.trainable, remat="none")
                after = log_odds(*losses(policy, elsewhere, rows=c.batch.rows), elsewhere)
                done[key] = {
                    "effect": (after - before).tolist(),
                    "tokens": trained.tokens,
                    "epochs": trained.tokens / size(data),
                }
                progress.say(f"{key}: {np.mean(after - before):+.4f} nats/token, {time.monotonic() - began:.0f} s")
                save_arrays(solution(out, key), trained.trainable, {"corpus": key})
                file.write_text(json.dumps(done, indent=1))
    return done


def solution(out: Path, key: str) -> Path:
    return out / f"{key}.safetensors"


def selected(poles: list[Mix], mixes: list[Mix], seeds: list[int], out: Path) -> dict[str, dict]:
    """Cosines of every mix with the two pure ones (no target, all target), and their difference, with intervals."""
    read = lambda mix, seed: load_arrays(solution(out, f"{mix.name}, seed {seed}"))[0]  # noqa: E731
    flat = lambda x, y: {k: v.ravel() for k, v in alignment(x, y).items()}  # noqa: E731
    found: dict[str, dict] = {}
    for mix in dict.fromkeys([*poles[:1], *mixes]):
        parts = {
            name: [flat(read(mix, s), read(pole, s)) for s in seeds]
            for name, pole in zip(("others", "target"), poles, strict=True)
        }
        of_matrices, of_seeds = draws(len(seeds), len(parts["target"][0]["both"]))
        samples, plain = {}, {}
        for name, each in parts.items():
            plain[name] = float(np.mean([cosine(np.ones(of_matrices.shape[1]), **p) for p in each]))
            resampled = np.stack([[cosine(w, **p) for w in of_matrices] for p in each], axis=1)
            samples[name] = (of_seeds * resampled).sum(axis=1)
        samples["lead"], plain["lead"] = samples["target"] - samples["others"], plain["target"] - plain["others"]
        found[mix.name] = {name: {"value": plain[name], "interval": interval(x)} for name, x in samples.items()}
    return found


def size(data: Any) -> int:
    return sum(len(x["tokens"]) for x in data.examples)


def draws(seeds: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of prompts and of seeds, the same for every corpus."""
    rng = np.random.default_rng(0)
    of_prompts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES) / prompts
    return of_prompts, rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds


def interval(samples: np.ndarray) -> list[float]:
    return np.percentile(samples, [2.5, 97.5]).tolist()


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of y `[..., points]` on x `[points]`."""
    centred = x - x.mean()
    return (y * centred).sum(axis=-1) / (centred**2).sum()


def analysed(done: dict, R: dict, axes: dict[str, list[Mix]], seeds: list[int]) -> dict[str, Any]:
    """Points with intervals, and the slope along each axis."""
    prompts = len(next(iter(done.values()))["effect"])
    of_prompts, of_seeds = draws(len(seeds), prompts)
    points, resampled = {}, {}
    for mix in dict.fromkeys(m for mixes in axes.values() for m in mixes):
        runs = [done[f"{mix.name}, seed {s}"] for s in seeds]
        effect = np.array([run["effect"] for run in runs])
        resampled[mix] = np.einsum("rs,sp,rp->r", of_seeds, effect, of_prompts)
        points[mix] = {
            "R": float(np.mean([l["R"] for l in R[mix.name]])),
            "null_95": float(np.mean([l["null_95"] for l in R[mix.name]])),
            "effect": float(effect.mean()),
            "interval": interval(resampled[mix]),
            "tokens": runs[0]["tokens"],
            "epochs": runs[0]["epochs"],
        }
    slopes = {}
    for axis, mixes in axes.items():
        if len(mixes) < 2:
            continue  # one point has no slope
        x = np.array([points[m]["R"] if axis == "coherence" else np.log2(m.prompts) for m in mixes])
        y = np.array([points[m]["effect"] for m in mixes])
        samples = slope(x, np.stack([resampled[m] for m in mixes], axis=-1))
        ends = resampled[mixes[-1]] - resampled[mixes[0]]
        slopes[axis] = {
            "slope": float(slope(x, y)),
            "interval": interval(samples),
            "last minus first": float(y[-1] - y[0]),
            "last minus first interval": interval(ends),
        }
    layer = next(iter(R.values()))[0]["layer"]
    named = {m.name: {"prompts": m.prompts, "share": m.share, **p} for m, p in points.items()}
    return {"layer": layer, "held-out prompts": prompts, "seeds": seeds, "points": named, "slopes": slopes}


def plotted(found: dict[str, Any], axes: dict[str, list[Mix]], path: Path) -> None:
    """Effect against R, and against volume, with intervals."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1, 2, shared_yaxes=True, subplot_titles=("coherence R, one volume", "prompts, one share of target")
    )
    for column, (axis, mixes) in enumerate(axes.items(), 1):
        some = [found["points"][m.name] for m in mixes]
        y = [p["effect"] for p in some]
        bars = {"type": "data", "symmetric": False}
        bars["array"] = [p["interval"][1] - p["effect"] for p in some]
        bars["arrayminus"] = [p["effect"] - p["interval"][0] for p in some]
        x = [p["R"] if axis == "coherence" else p["prompts"] for p in some]
        figure.add_scatter(
            x=x, y=y, error_y=bars, mode="lines+markers", text=[m.name for m in mixes], name=axis, row=1, col=column
        )
    figure.update_yaxes(title_text="log-odds gained in held-out domains, nats/token", row=1, col=1)
    figure.update_xaxes(title_text="mean resultant length R", row=1, col=1)
    figure.update_xaxes(title_text="prompts", type="log", row=1, col=2)
    figure.write_html(path, include_plotlyjs=True)


def printed(found: dict[str, Any]) -> None:
    with_interval = lambda p: f"{p['value']:.3f} [{p['interval'][0]:.3f}, {p['interval'][1]:.3f}]"  # noqa: E731
    print("| corpus | cosine with all target | with no target | the former minus the latter |\n|---|---|---|---|")
    for name, p in found["selected"].items():
        print(f"| {name} | {' | '.join(with_interval(p[k]) for k in ('target', 'others', 'lead'))} |")
    print(f"\nR at layer {found['layer']}; {found['held-out prompts']} held-out prompts, seeds {found['seeds']}\n")
    print("| corpus | epochs | R (95 % of null) | effect, nats/token [95 %] |\n|---|---|---|---|")
    for name, p in found["points"].items():
        low, high = p["interval"]
        effect = f"{p['effect']:+.4f} [{low:+.4f}, {high:+.4f}]"
        print(f"| {name} | {p['epochs']:.1f} | {p['R']:.3f} ({p['null_95']:.3f}) | {effect} |")
    for axis, s in found["slopes"].items():
        unit = "per unit of R" if axis == "coherence" else "per doubling of prompts"
        print(f"\n{axis}: slope {s['slope']:+.4f} [{s['interval'][0]:+.4f}, {s['interval'][1]:+.4f}] {unit}; ", end="")
        low, high = s["last minus first interval"]
        print(f"last minus first {s['last minus first']:+.4f} [{low:+.4f}, {high:+.4f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="bundled:discernment")
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[12, 24, 48], help="volumes; the last is that of the mixes"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="of target answers")
    parser.add_argument("--low", type=float, default=0.5, help="share at which volume grows")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=768, help="tokens of a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--heldout", type=int, default=18, help="prompts of the held-out domains")
    parser.add_argument("--out", type=Path, default=Path("runs/coherence"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    most = max(args.prompts)
    config = check(
        {
            "model": {"source": args.model},
            "corpus": {"path": args.corpus, "limit": most, "heldout_limit": args.heldout},
            "batch": {"rows": 1, "length": args.length},
            "optimizer": {"learning_rate": 5e-4, "warmup": 2},
            "arms": {"sft": {"objective": {"name": "sft"}, "steps": args.steps}},
        }
    )
    e = Experiment(config)
    rows = e.rows(*config.corpus.train)
    axes = {
        "coherence": [Mix(most, s) for s in sorted(args.shares)],
        "volume": [Mix(n, args.low) for n in sorted(args.prompts)],
    }
    mixes = list(dict.fromkeys([*axes["coherence"], *axes["volume"]]))
    poles = [Mix(most, 0.0), Mix(most, 1.0)]
    began = time.monotonic()
    done = effects(e, rows, list(dict.fromkeys([*mixes, *poles])), args.seeds, config.arms["sft"], args.out)
    found = {"selected": selected(poles, axes["coherence"], args.seeds, args.out)}
    found |= analysed(done, coherence_of(e, rows, mixes, args.seeds), axes, args.seeds)
    (args.out / "coherence.json").write_text(json.dumps(found, indent=1))
    plotted(found, axes, args.out / "coherence.html")
    printed(found)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
