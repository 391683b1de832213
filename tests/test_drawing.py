"""Choosing tokens: which ones the filters keep, values per row, keys per row, and what is refused."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.drawing import draw, drawing, threshold
from aif.errors import BadInput

GOLDEN = np.load(Path(__file__).parent / "golden" / "filters.npz")
keep = jax.jit(lambda p, how: p >= threshold(p, how))


@pytest.mark.parametrize("number", range(len(GOLDEN["settings"])))
def test_the_filters_keep_what_transformers_keeps(number):
    """Temperature, top-k, top-p and min-p alone and together (tests/golden/make_filters.py)."""
    warm, k, share, least = GOLDEN["settings"][number]
    p = jax.nn.softmax(GOLDEN["scores"] / np.float32(warm), axis=-1)
    np.testing.assert_array_equal(keep(p, drawing(warm, k, share, least)), GOLDEN["kept"][number])


def test_thresholds_by_hand():
    """p = (.4, .3, .2, .1): the second largest is .3; .4 + .3 reaches .7 and .6, not .75; half of .4 is .2; and within
    the three that top-k leaves (mass .9), .6 of the mass needs two."""
    p = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    for how, want in (
        ({"top_k": 2}, 0.3),
        ({"top_p": 0.6}, 0.3),
        ({"top_p": 0.75}, 0.2),
        ({"min_p": 0.5}, 0.2),
        ({"top_k": 3, "top_p": 0.6}, 0.3),
        ({"top_k": 9}, 0.0),
        ({}, 0.0),
    ):
        np.testing.assert_allclose(threshold(p, drawing(1.0, **how)), [[want]], rtol=1e-6, err_msg=str(how))


def test_equal_probabilities_stay_together_and_the_likeliest_always_stays():
    p = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(keep(p, drawing(1.0, top_k=1)), [[True] * 4, [True] + [False] * 3])
    np.testing.assert_array_equal(keep(p, drawing(1.0, top_p=1e-6)), [[True] * 4, [True] + [False] * 3])


def test_every_row_has_its_own_values_and_nothing_is_compiled_again():
    scores = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]] * 4))
    many = jax.jit(jax.vmap(draw, in_axes=(None, None, 0)))
    keys = jax.random.split(jax.random.key(0), (500, 4))
    made = np.asarray(many(scores, drawing([0, 1, 1, 1], [0, 2, 0, 0], [1, 1, 0.75, 1], [0, 0, 0, 0.9]), keys))
    assert [set(column) for column in made.T.tolist()] == [{1}, {1, 3}, {1, 2, 3}, {1}]
    again = np.asarray(many(scores, drawing([1.0] * 4, [0] * 4, [1.0] * 4, [0.0] * 4), keys))
    assert [set(column) for column in again.T.tolist()] == [{0, 1, 2, 3}] * 4
    share = (again == 1).mean()
    assert abs(share - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 2000)
    assert many._cache_size() == 1


def test_a_row_draws_by_its_own_key():
    scores = jax.random.normal(jax.random.key(1), (3, 50))
    keys = jax.random.split(jax.random.key(2), 3)
    how = drawing(1.0, top_p=0.95)
    together = draw(scores, how, keys)
    for row in range(3):
        assert int(draw(scores[row : row + 1], how, keys[row : row + 1])[0]) == int(together[row])


@pytest.mark.parametrize(
    "values,line",
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not a temperature"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": 1.0, "top_k": -3}, "top_k: -3 is no number of tokens"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k: 1.5"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p: 0.0 is not within \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: 1.1"),
        ({"temperature": 1.0, "min_p": 2.0}, r"min_p: 2.0 is not within \[0, 1\]"),
        ({"top_p": 0.9}, "temperature: 0 draws nothing"),
    ],
)
def test_values_that_are_refused(values, line):
    with pytest.raises(BadInput, match=line):
        drawing(**values)
