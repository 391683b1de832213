"""Budgets: where a stage ends that is matched by tokens or by KL, and that a stage cut off ends there too."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import build
from aif.budget import Budget, achieved
from aif.checkpoint import load_arrays
from aif.config import check
from aif.errors import BadInput
from aif.models.decoder import DecoderConfig
from aif.objectives import Objective
from aif.policy import Policy
from aif.train import Optimizer, Settings, stage
from aif.types import Loss, Mean

EMPTY = Policy({}, config=DecoderConfig("toy", vocab=7, width=8, layers=2, heads=2, kv_heads=1, head_dim=4, ff=6))
FRESH = {"vector": {"u": jnp.ones((2, 8)), "scale": jnp.ones(2)}}


def bowl(policy, batch):
    """sum (u - 3)^2 / 2, whatever the batch holds."""
    total = Mean(jnp.sum(jnp.square(policy.adapter["vector"]["u"] - 3)) / 2, jnp.float32(1))
    return Loss(total, {})


def moved(policy) -> float:
    """Stands for a KL: the squared length of the change."""
    return float(jnp.sum(jnp.square(policy.adapter["vector"]["u"] - 1)))


@pytest.fixture(scope="module")
def data(lm, rows):
    return build(rows, lm.tokenizer, which="target", length=384, target="discernment")


def run(data, budget, folder=None, steps=40):
    settings = Settings(steps, Optimizer(learning_rate=0.05), budget=budget, rows=1, checkpoint_every=3)
    return stage(EMPTY, FRESH, Objective(bowl), data, settings, folder=folder, distance=moved)


def test_what_is_spent():
    lines = [{"tokens": 100.0}, {"tokens": 120.0, "kl_from_reference": 0.4}]
    assert not Budget("tokens", 221).spent(lines) and Budget("tokens", 220).spent(lines)
    assert not Budget("kl", 0.5).spent(lines) and Budget("kl", 0.4).spent(lines) and not Budget("kl", 0.4).spent([])
    assert [Budget("kl", 1, every=5).due(k, 12) for k in (4, 5, 10, 12)] == [False, True, True, True]
    assert not Budget("tokens", 1).due(5, 5)
    assert [achieved(lines, m) for m in ("steps", "tokens", "kl")] == [2, 220, 0.4]


def test_tokens_say_how_long_a_schedule_is():
    """110 tokens a step so far and 1100 to spend: ten steps; before the first step and for a KL, the most there are."""
    lines = [{"tokens": 100.0}, {"tokens": 120.0}]
    assert Budget("tokens", 1100).steps(lines, 40) == 10 and Budget("tokens", 1e9).steps(lines, 40) == 40
    assert Budget("tokens", 1100).steps([], 40) == Budget("kl", 1.0).steps(lines, 40) == 40


def test_a_stage_ends_when_its_tokens_are_read(data):
    """The step that crosses the number is the last, and the learning rate has come down by then."""
    done = run(data, Budget("tokens", 2500))
    before = done.tokens - done.lines[-1]["tokens"]
    assert before < 2500 <= done.tokens and len(done.lines) < 40
    first, last = done.lines[0]["learning_rate"], done.lines[-1]["learning_rate"]
    assert last < 0.25 * first and first == np.float32(0.05)
    assert len(run(data, Budget("tokens", 1e9), steps=4).lines) == 4  # its steps are the most there are


def test_a_stage_ends_at_the_first_look_beyond_its_kl(data):
    done = run(data, Budget("kl", 1.5, every=4))
    looks = [(line["step"], line["kl_from_reference"]) for line in done.lines if "kl_from_reference" in line]
    assert [step for step, _ in looks] == list(range(4, len(done.lines) + 1, 4))
    assert all(kl < 1.5 for _, kl in looks[:-1]) and looks[-1][1] >= 1.5
    np.testing.assert_allclose(looks[-1][1], float(jnp.sum(jnp.square(done.trainable["vector"]["u"] - 1))), rtol=1e-6)


@pytest.mark.parametrize("budget", [Budget("tokens", 2500), Budget("kl", 1.5, every=4)], ids=["tokens", "kl"])
def test_a_stage_that_was_cut_off_ends_where_it_would_have(data, budget, tmp_path):
    """As if killed after its last checkpoint, and once more when it is finished."""
    whole = run(data, budget, tmp_path / "run")
    for name in ("done.json", "trained.safetensors"):
        (tmp_path / "run" / name).unlink()
    again = run(data, budget, tmp_path / "run")
    assert [{**x, "seconds": 0} for x in again.lines] == [{**x, "seconds": 0} for x in whole.lines]
    np.testing.assert_array_equal(again.trainable["vector"]["u"], whole.trainable["vector"]["u"])
    assert len(run(data, budget, tmp_path / "run").lines) == len(whole.lines)
    kept, _ = load_arrays(tmp_path / "run" / "trained.safetensors")
    np.testing.assert_array_equal(kept["vector"]["u"], whole.trainable["vector"]["u"])


@pytest.mark.parametrize(
    "budget,said",
    [
        ({"match": "tokens"}, "budget: value: match: tokens needs one"),
        ({"match": "kl", "value": 0}, "budget.value: Input should be greater than 0"),
        ({"match": "steps", "value": 2.5}, "2.5 is no number of steps"),
        ({"match": "time", "value": 3}, "budget.match: Input should be 'steps', 'tokens' or 'kl'"),
        ({"value": 3, "evry": 1}, "did you mean 'every'?"),
    ],
)
def test_a_budget_that_cannot_be(budget, said):
    with pytest.raises(BadInput, match="budget") as error:
        check({"arms": {"sft": {"objective": {"name": "sft"}, "steps": 1}}, "budget": budget})
    assert said in str(error.value)


def test_steps_may_be_given_to_all_arms_at_once():
    arms = {name: {"objective": {"name": "sft"}, "steps": n} for name, n in (("a", 3), ("b", 5))}
    assert [check({"arms": arms, "budget": {"value": 4}}).steps(a) for a in "ab"] == [4, 4]
    assert [check({"arms": arms}).steps(a) for a in "ab"] == [3, 5]
    with pytest.raises(BadInput, match="warmup=4 is longer than steps=2"):
        check({"arms": arms, "budget": {"value": 2}, "optimizer": {"warmup": 4}})
