"""Measured quantities on disk: every array once, and per quantity the function that values it and what it binds."""

from __future__ import annotations

import importlib
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from aif.basins import Measured

PLAIN = tuple(f.name for f in fields(Measured) if f.name != "value")


def packed(measured: list[Measured]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]] | None:
    """(arrays by number, records); None where a value is no partial of a named function, which cannot be kept."""
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[int, str] = {}  # id of an array that several quantities share -> its number
    records = []
    for m in measured:
        name = _named(m.value)
        if name is None:
            return None
        binds = {}
        for key, value in m.value.keywords.items():  # pyright: ignore[reportFunctionMemberAccess]
            number = numbers.setdefault(id(value), str(len(numbers)))
            arrays[number] = np.asarray(value, order="C")  # sums of a view round otherwise than those of its copy
            binds[key] = number
        records.append({field: getattr(m, field) for field in PLAIN} | {"function": name, "binds": binds})
    return arrays, records


def unpacked(arrays: dict[str, np.ndarray], records: list[dict[str, Any]]) -> list[Measured]:
    """The inverse of `packed`."""
    out = []
    for record in records:
        module, _, function = record["function"].partition(":")
        bound = {key: arrays[number] for key, number in record["binds"].items()}
        value = partial(getattr(importlib.import_module(module), function), **bound)
        plain: dict[str, Any] = {key: record[key] for key in PLAIN} | {"x": tuple(record["x"])}
        out.append(Measured(**plain, value=value))
    return out


def _named(value: Any) -> str | None:
    """`module:function` of a partial that binds keywords only, if the name leads back to the function."""
    if not isinstance(value, partial) or value.args:
        return None
    module, name = value.func.__module__, value.func.__qualname__
    if not module.startswith("aif.basins") or getattr(importlib.import_module(module), name, None) is not value.func:
        return None
    return f"{module}:{name}"
