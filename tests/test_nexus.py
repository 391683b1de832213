"""Scales, the profile of ratings, and agreement between raters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aif.corpus import load_scale, profile, quadratic_kappa
from aif.errors import BadInput

GOOD = "name: mood\nlevels: [no, yes]\ndimensions:\n  - id: calm\n"


def test_the_nexus_scale():
    scale = load_scale()
    assert scale == load_scale("nexus") and scale.name == "nexus"
    assert scale.levels == ("low", "medium", "cusp", "high")
    assert [d.id for d in scale.dimensions] == [
        "functional_integration",
        "relational_responsiveness",
        "co_creative_engagement",
        "relational_vulnerability",
        "ecological_belonging",
        "epistemic_humility",
        "metacognitive_awareness",
        "meta_relational_integrity",
        "ethical_consideration",
        "self_adaptation",
        "temporal_awareness",
        "resonance_and_disruption",
        "multispecies_relationality",
        "playfulness",
        "excess",
    ]
    sentences = [s for d in scale.dimensions for s in d.rubric]
    assert len(sentences) == len(set(sentences)) == 60 and all(s.endswith(".") for s in sentences)


def test_a_scale_of_ones_own_where_no_and_yes_are_words(tmp_path):
    (tmp_path / "mood.yaml").write_text(GOOD)
    scale = load_scale(tmp_path / "mood.yaml")
    assert scale.levels == ("no", "yes") and scale.dimensions[0].name == "calm" and scale.dimensions[0].rubric == ()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("name: [", ":1: not YAML"),
        ("name: a\nname: b\n", ":2: not YAML: a key is given twice"),
        ("name: &x a\nlevels: *x\n", ":2: not YAML: aliases"),
        ("? [a]\n: b\n", ":1: not YAML: a key is given twice or is no word"),
        ("name: a\n---\nname: b\n", "not YAML"),
        ("\tname: a", ":1: not YAML"),
        ("a: " + "[" * 3000, "not YAML"),
        ("name: \x01", "not YAML"),
        ("", ": scale: must be a mapping"),
        ("- a", ": scale: must be a mapping"),
        (GOOD + "level: 3\n", ": scale: unknown key 'level', did you mean 'levels'?"),
        ("name: a\nlevels: [a, b]\n", ": scale: dimensions is missing"),
        ("name: a\nlevels: [a]\ndimensions: [{id: x}]", ": levels: a scale has two levels or more"),
        ("name: a\nlevels: [a, a]\ndimensions: [{id: x}]", ": levels: 'a' is listed twice"),
        ("name: a\nlevels: a\ndimensions: [{id: x}]", ": levels: must be a list"),
        ("name: a\nlevels: [a, [b]]\ndimensions: [{id: x}]", ": levels[1]: must be text"),
        ("name: ''\nlevels: [a, b]\ndimensions: [{id: x}]", ": name: must be text that is not empty"),
        ("name: a\nlevels: [a, b]\ndimensions: []", ": dimensions: must be a list of at least one"),
        ("name: a\nlevels: [a, b]\ndimensions: [x]", ": dimensions[0]: must be a mapping"),
        ("name: a\nlevels: [a, b]\ndimensions: [{ids: x}]", ": dimensions[0]: unknown key 'ids', did you mean 'id'?"),
        ("name: a\nlevels: [a, b]\ndimensions: [{id: x}, {id: x}]", ": dimensions: 'x' is listed twice"),
        ("name: a\nlevels: [a, b]\ndimensions: [{id: x, rubric: [y]}]", ": dimensions[0].rubric: must be a list of 2"),
        ("#" * (1 << 21), ": larger than 1 MiB"),
    ],
)
def test_scale_files_that_are_none(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_scale(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:") and expected in message and len(message.splitlines()) == 1


def test_scales_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match="scale: no scale is called 'nexsus', did you mean 'nexus'"):
        load_scale("nexsus")
    with pytest.raises(BadInput, match="no such file"):
        load_scale(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="not YAML"):
        (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\xff\n")
        load_scale(tmp_path / "latin.yaml")


def test_profile_masks_what_is_unrated():
    """a: 0, 2 -> mean 1, variance 2; b: 1, 3, 2 -> mean 2, variance 1; together: (0, 1), (2, 3) -> covariance 2."""
    found = profile([{"a": 0, "b": 1}, {"a": 2, "b": 3}, {"b": 2}, {"z": 0}])
    assert found.dimensions == ("a", "b", "z") and found.count == {"a": 2, "b": 3, "z": 1}
    assert found.mean == {"a": 1.0, "b": 2.0, "z": 0.0} and found.pinned_low == ("z",)
    assert np.allclose(found.covariance[:2, :2], [[2, 2], [2, 1]]) and np.isnan(found.covariance[2]).all()


def test_profile_of_nothing_has_no_mean_and_pins_nothing():
    found = profile([], load_scale())
    assert len(found.mean) == 15 and all(math.isnan(m) for m in found.mean.values()) and found.pinned_low == ()
    assert found.covariance.shape == (15, 15)


def test_nine_in_ten_low_is_pinned():
    rows = [{"a": int(k == 0), "b": int(k < 2)} for k in range(10)]
    assert profile(rows).pinned_low == ("a",)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_agrees_with_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    a = random.integers(0, 4, 40)
    b = np.clip(a + random.integers(-1, 2, 40), 0, 3)
    expected = metrics.cohen_kappa_score(a, b, labels=[0, 1, 2, 3], weights="quadratic")
    assert quadratic_kappa(a, b, 4) == pytest.approx(expected, abs=1e-12)


def test_kappa_by_hand():
    """Two levels, table [[1, 1], [0, 2]] -> disagreement 1; expected off-diagonal (2*3 + 2*1)/4 = 2; kappa 1 - 1/2."""
    assert quadratic_kappa([0, 0, 1, 1], [0, 1, 1, 1], 2) == pytest.approx(0.5)
    assert quadratic_kappa([0, 1, 2, -1], [0, 1, 2, 0], 3) == 1.0
    assert quadratic_kappa([0, 3], [3, 0], 4) == pytest.approx(-1.0)
    assert math.isnan(quadratic_kappa([1, 1], [1, 1], 4)) and math.isnan(quadratic_kappa([], [], 4))


def test_kappa_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="one length"):
        quadratic_kappa([0, 1], [0], 4)
    with pytest.raises(ValueError, match="outside 0..3"):
        quadratic_kappa([0, 4], [0, 1], 4)
