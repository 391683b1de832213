"""Questions that a config asks before the run, and the one rule that answers them.

With the difference arm - baseline turned so that the claimed direction is positive, its 95 % interval [low, high] over
rows and seeds, and its p-value corrected over the whole table:

    supported      low > minimum effect, and corrected p < 0.05
    contradicted   high < minimum effect: the least effect that counts is ruled out
    inconclusive   anything else, or not measured
    single seed    one training seed would have been supported or contradicted; it says nothing of other runs
"""

from __future__ import annotations

from aif import results as records
from aif.config import Config, Question
from aif.errors import BadInput
from aif.plugins import nearest, plugin
from aif.statistics import Pair

ALPHA = 0.05


def pairs(config: Config) -> list[Pair]:
    """What the config's questions compare."""
    return [(q.metric, q.quantity, q.arm, against(q, config)) for q in config.questions]


def against(question: Question, config: Config) -> str:
    """The arm that a question compares with."""
    return question.baseline or config.baseline or next(iter(config.arms))


def check_question(question: Question, config: Config, where: str) -> None:
    """A question can be answered by this config.

    Raises:
      BadInput: it names a metric, quantity, arm or baseline that the config does not have.
    """
    baseline = against(question, config)
    for key, name, names in (
        ("metric", question.metric, list(config.measure)),
        ("arm", question.arm, list(config.arms)),
        ("baseline", baseline, list(config.arms)),
    ):
        if name not in names:
            there = ", ".join(names) or "none"
            raise BadInput(f"{where}.{key}: nothing here is called {name!r}{nearest(name, names)}; there are {there}")
    if question.arm == baseline:
        raise BadInput(f"{where}.arm: {baseline!r} cannot be compared with itself; name another arm or baseline")
    module, _ = plugin("basins", question.metric, config.measure[question.metric], f"{where}.metric")
    patterns: list[str] = [*getattr(module, "QUANTITIES", ())]
    names = [*dict.fromkeys(p.format(arm=arm) for p in patterns for arm in config.arms)]
    if question.quantity not in names:
        raise BadInput(
            f"{where}.quantity: {question.metric} has no number {question.quantity!r}"
            f"{nearest(question.quantity, names)}; it has {', '.join(names) or 'none to ask about'}"
        )


def answers(config: Config, differences: list[records.Difference]) -> list[records.Answer]:
    """Every question of the config with its verdict and the reason in words."""
    found = {(d.metric, d.quantity, d.arm, d.baseline): d for d in differences}
    return [_answer(q, config, found.get(p)) for q, p in zip(config.questions, pairs(config), strict=True)]


def _answer(question: Question, config: Config, d: records.Difference | None) -> records.Answer:
    baseline = against(question, config)
    asked = question.model_dump() | {"baseline": baseline}
    asked["id"] = question.id or f"{question.metric}: {question.quantity}, {question.arm} against {baseline}"
    if d is None:
        reason = "the quantity was not measured for both arms; the notes say what was left out"
        empty = dict.fromkeys(("value", "low", "high", "p_adjusted"))
        return records.Answer(**asked, **empty, unit="", verdict="inconclusive", reason=reason)
    verdict, reason = verdict_of(d, question.direction, question.minimum_effect)
    numbers = {"value": d.value, "low": d.low, "high": d.high, "p_adjusted": d.p_adjusted, "unit": d.unit}
    return records.Answer(**asked, **numbers, verdict=verdict, reason=reason)


def verdict_of(d: records.Difference, direction: str, minimum: float) -> tuple[records.Verdict, str]:
    """The rule above, and its reason in words."""
    low, high = (d.low, d.high) if direction == "higher" else (-d.high, -d.low)
    more = f"{'more' if direction == 'higher' else 'less'} than {d.baseline}"
    between = f"{d.arm} has between {low:.3g} and {high:.3g}{f' {d.unit}' if d.unit else ''} {more}"
    least = f"the least effect that counts, {minimum:g}"
    if low > minimum and d.p_adjusted < ALPHA:
        verdict, reason = "supported", f"{between}, all beyond {least}; corrected p = {d.p_adjusted:.2g}"
    elif low > minimum:
        verdict, reason = "inconclusive", f"{between}, all beyond {least}, but corrected p = {d.p_adjusted:.2g}"
    elif high < minimum:
        verdict, reason = "contradicted", f"{between}, all short of {least}"
    else:
        verdict, reason = "inconclusive", f"{between}, which holds {least}"
    if len(d.seeds) < 2 and verdict != "inconclusive":
        return "single seed", f"{reason}; over rows alone this is {verdict}, one seed says nothing of other runs"
    return verdict, reason  # pyright: ignore[reportReturnType]
