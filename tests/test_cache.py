"""Finished work under its hash, and measured quantities on disk."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from aif.basins import Measured, efficiency, ratio
from aif.cache import STAGE, Cache, content_hash, digest
from aif.checkpoint import WAYPOINTS
from aif.measured import packed, unpacked


def test_the_hash_is_of_the_content():
    assert content_hash({"a": 1, "b": [2, None]}) == content_hash({"b": [2, None], "a": 1})
    assert len({content_hash(x) for x in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": 1.5}, {"a": [1]}, None)}) == 6
    one = {"q": {"a": np.arange(6.0).reshape(2, 3)}}
    assert digest(one) == digest({"q": {"a": np.arange(6.0).reshape(2, 3)}})
    others = [
        {"q": {"b": one["q"]["a"]}},
        {"q": {"a": one["q"]["a"].T}},
        {"q": {"a": one["q"]["a"].astype(np.float32)}},
    ]
    assert len({digest(x) for x in (one, *others)}) == 4


def made(calls: list) -> dict:
    calls.append(1)
    return {"x": {"y": np.linspace(0, 1, 5)}, "z": np.arange(3)}


def test_work_is_done_once(tmp_path):
    """float64 stays float64; another identity is other work; without a folder nothing is kept."""
    calls: list = []
    cache = Cache(tmp_path)
    for _ in range(2):
        found = cache.arrays("kind", {"a": 1}, lambda: made(calls))
        assert found["x"]["y"].dtype == np.float64
        np.testing.assert_array_equal(found["x"]["y"], np.linspace(0, 1, 5))
    assert len(calls) == 1
    cache.arrays("kind", {"a": 2}, lambda: made(calls))
    Cache(tmp_path, read=False).arrays("kind", {"a": 1}, lambda: made(calls))
    Cache().arrays("kind", {"a": 1}, lambda: made(calls))
    assert len(calls) == 4
    assert cache.record("notes", {"a": 1}, lambda: ["x", {"y": 1}]) == cache.record("notes", {"a": 1}, lambda: 1 / 0)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_entry_is_made_again(tmp_path, damage):
    said, calls = [], []
    cache = Cache(tmp_path, say=said.append)
    cache.arrays("kind", 1, lambda: made(calls))
    (path,) = (tmp_path / "kind").iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data[:-9] if damage == "cut" else data)
    found = cache.arrays("kind", 1, lambda: made(calls))
    np.testing.assert_array_equal(found["z"], np.arange(3))
    assert len(calls) == 2 and "made again" in said[0]
    cache.arrays("kind", 1, lambda: made(calls))
    assert len(calls) == 2


def test_a_stage_is_lent_from_run_to_run(tmp_path):
    one, two = tmp_path / "one" / "sft", tmp_path / "two" / "sft"
    one.mkdir(parents=True)
    for name in STAGE:
        (one / name).write_text(f"{name} of one")
    (one / WAYPOINTS).mkdir()
    (one / WAYPOINTS / "3.safetensors").write_text("after step 3")
    cache = Cache(tmp_path / "cache")
    assert not cache.fetch("id", two)
    cache.publish("id", one)
    assert cache.fetch("id", two) and not cache.fetch("id", two)  # a folder that holds anything is left alone
    assert [(two / name).read_text() for name in STAGE] == [f"{name} of one" for name in STAGE]
    assert (two / WAYPOINTS / "3.safetensors").read_text() == "after step 3"
    assert not Cache(tmp_path / "cache", read=False).fetch("id", tmp_path / "three")
    assert not [p for p in tmp_path.rglob("*.tmp")]


def quantity(value, **other) -> Measured:
    fields = {"metric": "m", "quantity": "q", "unit": "u", "better": "lower", "subject": "s", "seed": 3}
    return Measured(**fields, control=False, rows=4, row_name="rows", value=value, **other)


def test_measured_quantities_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    sums, tokens = rng.normal(size=(3, 4)).T, rng.integers(1, 9, 4).astype(float)  # sums is a view, not contiguous
    measured = [
        quantity(ratio(sums, tokens), x=(0.5, 1.0, 2.0), x_label="norm"),
        quantity(partial(efficiency.minimum, sums=sums, tokens=tokens)),
    ]
    arrays, records = packed(measured) or ({}, [])
    assert len(arrays) == 2  # what they share is kept once
    cache = Cache(tmp_path)
    cache.packed("measured", 1, lambda: (arrays, records))
    again = unpacked(*cache.packed("measured", 1, lambda: 1 / 0))
    for before, after in zip(unpacked(arrays, records), again, strict=True):
        for w in (np.ones(4), np.array([2.0, 0, 1, 1])):
            np.testing.assert_array_equal(before.value(w), after.value(w))
        assert (before.x, before.x_label, before.seed, before.quantity) == (
            after.x,
            after.x_label,
            after.seed,
            after.quantity,
        )


def test_a_value_without_a_name_cannot_be_kept():
    assert packed([quantity(lambda w: w.sum())]) is None
    assert packed([quantity(partial(np.dot, np.ones(4)))]) is None
