"""The sweep: effects and costs against ones made by hand, one program for the grid, front and recommendation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.adapter import steering_vector
from aif.basins.generality import log_odds
from aif.basins.scoring import _divergences, _losses, divergences, losses
from aif.batches import build
from aif.directions.sweep import Ground, Point, Sweep, front, recommend, sweep, text_data
from aif.errors import BadInput
from aif.tokens import encode_prompt
from aif.types import Direction

DOSES = (-0.5, 0.25, 1.0)


@pytest.fixture(scope="module")
def ground(lm, base, rows):
    pairs = build(rows[:4], lm.tokenizer, which="all", length=512, target="discernment")
    asked = [encode_prompt(lm.tokenizer, row.prompt) for row in rows[:2]]
    return Ground(base, pairs, text_data(lm.tokenizer, "pydoc", 3, 48), asked, lm.tokenizer.eos_token_id, str)


@pytest.fixture(scope="module")
def direction(base):
    v = jax.random.normal(jax.random.key(0), (base.config.layers, base.config.width))
    return Direction(v, "contrast", {"norms": [2.0, 3.0], "layer": 1, "weights": "w"})


@pytest.fixture(scope="module")
def made(ground, direction):
    run = partial(sweep, ground, direction, np.array([2.0, 3.0]), layers=[0, 1], doses=DOSES, new_tokens=6)
    count = lambda policy, data: float(losses(policy, data, rows=2)[0].sum())  # noqa: E731
    return run(reader=count, max_kl=0.5)


def test_a_point_is_what_the_vector_adapter_does(made, ground, direction):
    """The same push as an adapter, scored by the metrics' own functions."""
    base = ground.base
    plain = log_odds(*losses(base, ground.pairs, rows=2), ground.pairs)
    for layer, dose, norm in ((0, -0.5, 2.0), (1, 1.0, 3.0)):
        vector = steering_vector(base.config, layers=[layer])
        unit = direction.vector[layer] / jnp.linalg.norm(direction.vector[layer])
        vector["vector"]["u"] = vector["vector"]["u"].at[layer].set(dose * norm * unit)
        pushed = base.replace(adapter=vector)
        point = next(p for p in made.points if (p.layer, p.dose) == (layer, dose))
        effect = log_odds(*losses(pushed, ground.pairs, rows=2), ground.pairs) - plain
        np.testing.assert_allclose(point.effect, effect.mean(), rtol=1e-3, atol=1e-5)
        sums, tokens = divergences(base, [pushed], ground.texts, rows=2)
        np.testing.assert_allclose(point.kl, sums.sum() / tokens.sum(), rtol=1e-3)
        assert point.effect_low <= point.effect <= point.effect_high and point.kl_low <= point.kl <= point.kl_high
        moved = losses(pushed, ground.pairs, rows=2)[0].sum() - losses(base, ground.pairs, rows=2)[0].sum()
        np.testing.assert_allclose(point.reading, moved, rtol=1e-3)


def test_other_layers_and_doses_compile_nothing(made, ground, direction):
    counts = [f._cache_size() for f in (_losses, _divergences)]
    quiet = replace(ground, asked=())
    again = sweep(quiet, direction, np.ones(2), layers=[1], doses=[0.1, 0.7, 2.0, 3.0])
    assert [f._cache_size() for f in (_losses, _divergences)] == counts
    assert [p.dose for p in again.points] == [0.1, 0.7, 2.0, 3.0]


def test_the_record_reads_back_and_makes_a_map(made, tmp_path):
    made.save(tmp_path / "sweep.json")
    again = Sweep.model_validate_json((tmp_path / "sweep.json").read_bytes())
    assert again == made and again.direction == {"kind": "contrast", "layer": 1, "weights": "w"}
    table = np.array(made.map("kl"))
    assert table.shape == (2, 3) and table[1, 2] == made.points[5].kl and (table >= 0).all()
    assert {*made.plain} == {"repetition", "compression", "perplexity"}
    assert made.points[0].repetition is not None and made.points[0].perplexity > 1


def point(layer, effect, kl, low=None):
    low = effect - 0.1 if low is None else low
    shared = {"effect_low": low, "effect_high": effect + 0.1, "kl_low": kl, "kl_high": kl}
    return Point(layer=layer, dose=1.0, effect=effect, kl=kl, **shared)


def test_the_front_and_the_recommendation_by_hand():
    """Effects 1, 3, 2, 3 at costs .1, .2, .3, .4: the first two are on the front; a budget of .35 buys the second."""
    points = front([point(k, e, c) for k, (e, c) in enumerate(((1, 0.1), (3, 0.2), (2, 0.3), (3, 0.4)))])
    assert [p.on_front for p in points] == [True, True, False, False]
    assert recommend(points, 0.35)[0] == points[1] and recommend(points, 0.15)[0] == points[0]
    none, reason = recommend(points, 0.05)
    assert none is None and "the cheapest costs 0.1" in reason
    none, reason = recommend([point(0, 0.2, 0.1, low=-0.1)], 1.0)
    assert none is None and "no effect is clear of zero; the largest is +0.2 [-0.1, +0.3] at layer 0" in reason


@pytest.mark.parametrize(
    "options,line",
    [
        ({"layers": [2]}, r"layers \[2\] are not all of the model's; it has layers 0..1"),
        ({"layers": []}, "layers"),
        ({"doses": [0.0, 1.0]}, "different finite numbers other than 0"),
        ({"doses": [1.0, 1.0]}, "different finite numbers"),
        ({"doses": [float("nan")]}, "different finite numbers"),
        ({"max_kl": 0.0}, "max_kl 0.0 must be a positive"),
    ],
)
def test_grids_that_cannot_be(options, line, ground, direction):
    with pytest.raises(BadInput, match=line):
        sweep(ground, direction, np.ones(2), **{"layers": [0], **options})
