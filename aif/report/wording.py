"""What the report says in words: numbers with their intervals, verdict sentences, and what each curve means.

A sentence never says more than its interval: where the interval of a difference holds zero, no difference was shown.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from aif.results import Difference, Results

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
BETTER = {"lower": "↓ lower is better", "higher": "↑ higher is better", "": ""}


class Meaning(NamedTuple):
    """One sentence on a curve and the direction that is good; `line` is a level worth marking, with its name."""

    text: str
    better: str = ""
    line: tuple[float, str] | None = None


METRICS = {
    "efficiency": "How low the held-out loss gets when every solution is rescaled to the same size. A basin that "
    "reaches a low loss with a small change of the weights is easier to find.",
    "stability": "How much of the gain survives when the solution is turned towards a random direction while it "
    "keeps its size. A solution in a wide basin loses little.",
    "significance": "How far the solution moves next-token predictions on ordinary text. A large shift at equal size "
    "means that the solution lies along something pre-training already uses, and counts as the stronger basin; it does "
    "not say that the answers are better.",
    "generality": "Whether the preference for the target answers carries over to held-out prompts of the training "
    "domains, and to domains that were never trained on. Zero means that nothing was gained over the base model.",
    "geometry": "Which way the solutions lie from the base model. A cosine of 1 is the same direction; the random twin "
    "shows what unrelated directions have. Solutions that share a first stage share its change, which raises cosines.",
    "connectivity": "Whether the held-out loss rises on the straight line between two solutions. Without a barrier "
    "they lie in one basin; the random twin shows the line to a place that nothing was trained to reach.",
    "transfer": "Whether a solution's mean shift of the residual stream, added to the base model, does what the "
    "solution does, and whether taking the shift out of another solution undoes that one. 100 % is the whole effect.",
    "metastability": "What more training does: whether a solution comes back after noise, and where it goes under "
    "another arm's objective. A solution that is left for another one was held in place by its objective alone.",
    "context": "What earlier turns do to the base model without any change of weights, beside what fine-tuning does. "
    "The control is as many turns of another stance. More effective dimensions mean a richer shift.",
}

CURVES = {
    ("efficiency", "loss"): Meaning(
        "Held-out loss of each solution rescaled to the norm on the axis; the lower curve is the more efficient one.",
        "lower",
    ),
    ("efficiency", "gain per squared norm"): Meaning(
        "Loss saved against the base model, divided by the squared norm, at equal norm.", "higher"
    ),
    ("stability", "gain lost"): Meaning(
        "Share of the gain lost under noise of size e: 0 % is untouched, 100 % is back at the base model.",
        "lower",
        (100.0, "base model"),
    ),
    ("significance", "KL from the base model"): Meaning(
        "KL divergence of the solution from the base model on pre-training-like text, at equal norm.", "higher"
    ),
    ("geometry", "cosine with"): Meaning("Cosine of the weight changes, layer by layer.", "", (0.0, "unrelated")),
    ("geometry", "path, component"): Meaning("Where each arm was along a principal component of all arms' paths."),
    ("connectivity", "loss from"): Meaning("Held-out loss on the straight line; a hump is a barrier.", "lower"),
    ("transfer", "effect produced by its own shift"): Meaning(
        "Share of the solution's effect that its mean shift produces in the base model, against dose.",
        "",
        (100.0, "the whole effect"),
    ),
    ("metastability", "cosine with"): Meaning("Cosine with a solution as training goes on under another objective."),
    ("metastability", "norm"): Meaning("Effective norm as training goes on under another objective."),
    ("context", "log-odds"): Meaning(
        "Log-odds of target over contrast answers; above zero the target answer is the likelier one.",
        "higher",
        (0.0, "flip"),
    ),
    ("context", "projection"): Meaning("How far the answer's residual lies along the mean shift of context."),
}

TERMS = {
    "pragmatic": "Pragmatic value: expected log-preference of the outcomes; maximised.",
    "state_gain": "Information gain about the states of a response (salience); maximised.",
    "parameter_gain": "Information gain about the reader's parameters (novelty); maximised.",
    "kl_habit": "KL of the policy from its habit, the reference model: what the change costs.",
    "entropy": "Entropy of the policy over the candidates of a prompt.",
    "G": "Expected free energy, minus the weighted sum of the values above; minimised.",
    "divergence": "KL of the policy posterior from the policy, the loss itself; minimised.",
}
BOOKKEEPING = {"step", "loss", "skipped", "learning_rate", "tokens", "seconds", "gradient_norm"}


def meaning(metric: str, quantity: str, unit: str, x_label: str) -> Meaning:
    """What a curve means, by its name or how it begins; without an entry, a plain sentence from its own fields."""
    plain = Meaning(f"{quantity}{f', {unit},' if unit else ''} against {x_label or 'the grid'}.")
    exact = CURVES.get((metric, quantity))
    begun = [m for (name, start), m in CURVES.items() if name == metric and quantity.startswith(start)]
    return exact or next(iter(begun), plain)


def _decimal(value: float, places: int) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    return f"{value:,.{places}f}".replace("-", "−").replace(",", "\u202f")


def interval(value: float, low: float, high: float) -> tuple[str, str]:
    """`value` and `[low, high]` as text, to the same decimals: two digits of the interval's width, four of the value
    where there is none. Very small and very large numbers share a power of ten."""
    size = max((abs(x) for x in (value, low, high) if math.isfinite(x)), default=0.0)
    power = ""
    if size and (size < 1e-3 or size >= 1e7):
        exponent = math.floor(math.log10(size))
        value, low, high, size = (x / 10.0**exponent for x in (value, low, high, size))
        power = f" × 10{str(exponent).translate(SUPERSCRIPT)}"
    width = high - low
    scale = width if math.isfinite(width) and width > 0 else size / 100
    places = min(max(1 - math.floor(math.log10(scale)), 0), 6) if scale > 0 else 0
    text, *ends = (_decimal(x, places) for x in (value, low, high))
    return text + (power if math.isfinite(value) else ""), f"[{', '.join(ends)}]{power}"


def number(value: float | int | None) -> str:
    """One number: up to four significant digits, whole numbers whole."""
    if value is None:
        return "–"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return _decimal(value, 0)
    digits, times, power = interval(value, value, value)[0].partition(" × ")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + times + power


def counted(n: int, rows: str, seeds: list[int]) -> str:
    """`n = 48 held-out prompts, seeds 0, 1`."""
    named = f", seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else ""
    return f"n = {n} {rows}{named}"


def joined(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else ""


def compared(results: Results) -> str:
    """One paragraph: what was trained, on what, and against what."""
    seeds = sorted({s for scalar in results.scalars if not scalar.control for s in scalar.seeds})
    source, path, rows = results.model.get("source"), results.corpus.get("path"), results.corpus.get("rows")
    objectives = {log.arm: log.objective for log in results.training}
    arms = [a if objectives.get(a, a) == a else f"{a} (objective {objectives[a]})" for a in results.arms]
    others = [a for a in results.arms if a != results.baseline]
    text = f"{joined(arms)} {'was' if len(arms) == 1 else 'were'} trained" if arms else "Nothing was trained"
    text += f" from {source}" if source else ""
    text += f" on the corpus {path}" if path else ""
    text += f" ({rows} rows)" if rows is not None else ""
    if len(others) < len(arms) and others:
        verb = "is" if len(others) == 1 else "are"
        text += f"; {joined(others)} {verb} compared with the baseline {results.baseline}"
    if seeds:
        text += f". {'Training seeds' if len(seeds) > 1 else 'One training seed'}: {', '.join(map(str, seeds))}"
    return text + "."


def summary(arm: str, baseline: str, differences: list[Difference]) -> str:
    """How the differences of one arm fall out, counted."""
    count = {v: sum(d.verdict == v for d in differences) for v in ("arm better", "baseline better")}
    unclear = len(differences) - sum(count.values())
    if unclear == len(differences):
        return f"{arm} against {baseline}: no difference shown on any of {len(differences)} quantities."
    return (
        f"{arm} against {baseline}: better on {count['arm better']} of {len(differences)} quantities, worse on "
        f"{count['baseline better']}, no difference shown on {unclear}."
    )


def sentence(d: Difference) -> str:
    """One difference as a sentence, with its interval."""
    value, ends = interval(d.value, d.low, d.high)
    found = f"{value}{f' {d.unit}' if d.unit else ''}, 95\u00a0% interval {ends}"
    if d.verdict == "no difference shown":
        return f"No difference shown between {d.arm} and {d.baseline} ({d.arm}\u00a0−\u00a0{d.baseline} = {found})."
    better, worse = (d.arm, d.baseline) if d.verdict == "arm better" else (d.baseline, d.arm)
    return f"{better} does better than {worse} ({d.arm}\u00a0−\u00a0{d.baseline} = {found})."
