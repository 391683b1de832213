"""What a compiled program sends between devices, read from its text, and what it computes, read from its jaxpr.

XLA counts a loop's body once; here every loop counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4} | {f"{sign}{n}": n for sign in "su" for n in (8, 16, 32, 64)}
BITS |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{(.*?)\}"
)
_GROUP = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
_TIMES = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Sent(NamedTuple):
    """How often a kind of collective runs in a step, the bytes of its results on one device, and the bytes that a
    device sends when devices form a ring."""

    count: int
    size: int
    sent: float


def collectives(text: str) -> dict[str, Sent]:
    """The collectives of a compiled program by kind, per device, from the text of its optimised HLO."""
    own: dict[str, list[tuple[str, int, float]]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    name, entry = "", ""
    devices = int(m[1]) if (m := re.search(r"num_partitions=(\d+)", text)) else 1
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            own[name], calls[name] = [], []
        elif found := _COLLECTIVE.search(line):
            own[name].append((found[2], *_bytes(found[2], found[1], line, devices)))
        if " = " in line and "=%" in line:
            times = int(m[1]) if (m := _TIMES.search(line)) else 1
            callees = [c for one, many in _CALLED.findall(line) for c in (many.split(",") if many else [one])]
            calls[name] += [(c.strip().lstrip("%"), times) for c in callees]
    totals: Counter[tuple[str, str]] = Counter()

    def walk(name: str, times: int) -> None:
        for kind, size, sent in own.get(name, ()):
            totals[kind, "count"] += times
            totals[kind, "size"] += times * size
            totals[kind, "sent"] += times * sent  # pyright: ignore[reportArgumentType]
        for callee, n in calls.get(name, ()):
            walk(callee, times * n)

    walk(entry, 1)
    return {k: Sent(totals[k, "count"], totals[k, "size"], totals[k, "sent"]) for k in KINDS if totals[k, "count"]}


def _bytes(kind: str, result: str, line: str, devices: int) -> tuple[int, float]:
    """(bytes of the result, bytes that one of n devices sends around a ring; n is all where no group is named)."""
    size = 0
    for dtype, sides in re.findall(r"(\w+)\[([\d,]*)\]", result):
        size += BITS.get(dtype, 32) * math.prod(int(s) for s in sides.split(",") if s) // 8
    group = _GROUP.search(line)
    n = devices if group is None else int(group[1]) if group[1] else len(group[2].split(","))
    share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
    return size, share * size


def flops(jaxpr: Any) -> int:
    """Operations of the matrix products of a jaxpr, two for a multiplication and an addition; loops in full."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general"):
            total += _product(equation)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [flops(getattr(j, "jaxpr", j)) for j in _inside(equation.params)]
        total += times * (max(inner, default=0) if equation.primitive.name == "cond" else sum(inner))
    return total


def _product(equation: Any) -> int:
    left, right = (v.aval.shape for v in equation.invars[:2])
    if equation.primitive.name != "dot_general":  # every row meets one of the matrices
        return 2 * math.prod(left) * right[-1]
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[k] for k in contracted)


def _inside(parameters: dict[str, Any]) -> list[Any]:
    values = [v for value in parameters.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]
