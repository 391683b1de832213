"""The T-maze of `benchmarks/tmaze.py`: the maze is pymdp's, and a decoder learns what pymdp's agent computes in it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("pymdp")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tmaze():
    spec = importlib.util.spec_from_file_location("tmaze", ROOT / "benchmarks" / "tmaze.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tmaze"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmaze):
    return tmaze.World(tmaze.read(ROOT / "configs" / "tmaze.yaml"))


def test_the_maze_is_pymdps(world):
    from pymdp.envs.tmaze import SimplifiedTMaze

    maze = world.options.maze
    env = SimplifiedTMaze(
        reward_probability=maze.reward_probability, cue_validity=maze.cue_validity, dependent_outcomes=True
    )
    assert env.A_dependencies == [[0, 1], [0, 1]] and env.B_dependencies == [[0], [1]]
    for mine, theirs in zip([*world.A, *world.B], [*env.A, *env.B], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("state_weight", [0.0, 1.0])
def test_the_posterior_is_pymdps(tmaze, world, state_weight):
    np.testing.assert_allclose(world.posterior(state_weight), tmaze.by_pymdp(world, state_weight), atol=1e-4)


def test_only_the_epistemic_part_makes_the_cue_worth_a_visit(tmaze, world):
    full, utility = (tmaze.summary(world, world.posterior(w))["visits the cue"] for w in (1.0, 0.0))
    assert full > 0.9 and utility < 0.1


def test_strings_are_evaluated_by_what_was_seen(tmaze, world):
    """The reader's table agrees with G computed string by string, and a sequence that is none has no value."""
    data = tmaze.every_string(world)
    batch = next(tmaze.once(data, rows=3))
    terms = world.evaluation.evaluate(None, batch)
    there = batch.ids >= 0
    for name in tmaze.TERMS:
        by_id = dict(zip(batch.ids[there].tolist(), np.asarray(terms[name])[there].tolist(), strict=True))
        got = np.array([by_id[k] for k in range(len(data.owners))]).reshape(len(tmaze.CONTEXTS), -1)
        np.testing.assert_allclose(got, world.table[name], atol=1e-6)
    deaf = world.evaluation.evaluate(None, batch._replace(targets=jnp.zeros_like(batch.targets)))
    assert (np.asarray(deaf["pragmatic"])[there] == tmaze.UNHEARD).all()


def quick(options, **steps):
    how = {name: {**getattr(options, name), "steps": n} for name, n in steps.items()}
    return options.model_copy(update=how)


@pytest.mark.parametrize("name", ["efe", "efe, utility only"])
def test_a_decoder_learns_pymdps_distribution(tmaze, world, name):
    found = tmaze.run(quick(world.options, offline=250), [name])[name]
    assert found["variation"] <= 0.02
    assert (found["visits the cue"] > 0.9) == (name == "efe")


def test_a_decoder_learns_it_from_samples_of_its_own(tmaze, world):
    found = tmaze.run(quick(world.options, online=300), ["efe, online"])["efe, online"]
    assert found["variation"] <= 0.06 and found["mass"] > 0.98 and found["visits the cue"] > 0.85
