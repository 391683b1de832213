"""Objectives on the policy's own samples: baselines, ratios, divergences, and gradients against enumeration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from aif import testing
from aif.batches import one_per_row
from aif.errors import BadInput
from aif.models.decoder import DecoderConfig, logits
from aif.models.module import random_params
from aif.objectives import Rollouts
from aif.objectives import online as estimators
from aif.objectives.efe import Online, Options, efe
from aif.objectives.grpo import Options as GrpoOptions
from aif.objectives.grpo import group_relative, grpo
from aif.objectives.logprobs import token_logprobs
from aif.objectives.terms import Evaluation
from aif.policy import Policy
from aif.rollouts import Prompts, prompts_of, roll
from aif.slots import asked_last, response_tokens
from aif.tokens import tree

VOCAB = 6
UTILITY = jnp.array([0.3, -1.0, 0.7, 0.1, -0.4, 1.2])


def by_token(taps, batch, *, utility, gain):
    """The first token of an answer decides what it is worth."""
    first = jnp.clip(response_tokens(batch, 1)[..., 0], 0, len(utility) - 1)
    value = utility[first]
    return {"pragmatic": value, "state_gain": gain * jnp.square(value), "parameter_gain": jnp.zeros_like(value)}


def evaluation(gain=0.5):
    return Evaluation(Partial(by_token, utility=UTILITY, gain=gain))


@pytest.fixture(scope="module")
def small():
    """A policy and its habit: two layers, six tokens, different weights, one head."""
    config = DecoderConfig("small", VOCAB, 8, 2, 2, 2, 4, 16, tied=False)
    habit, policy = (jax.tree.map(lambda x: 3 * x, random_params(config, seed)) for seed in (0, 1))
    policy["head"] = habit["head"] = 10 * policy["head"]
    return Policy(policy, config=config), Policy(habit, config=config)


def arrays(batch):
    return jax.tree.map(jnp.asarray, batch)


def every_pair():
    """A row per pair of one-token answers to one prompt `[36 rows, 2 responses]`."""
    trees = [tree([1, 2], [[i], [j]]) for i in range(VOCAB) for j in range(VOCAB)]
    return arrays(one_per_row(trees, 4, 2, 2))


def enumerated(objective, policy, habit):
    """E over pairs of samples of the loss's gradient, exactly."""
    batch = every_pair()
    logps = token_logprobs(policy, batch)
    facts = objective.prepare(habit, batch, jax.random.key(0))
    batch = batch._replace(extras={**facts, "sampled_logps": logps})
    chance = jnp.exp(logps.sum(axis=1))
    np.testing.assert_allclose(chance.sum(), 1.0, rtol=1e-4)

    def expected(params):
        row = lambda b: objective.loss(policy.replace(params=params), jax.tree.map(lambda x: x[None], b)).total  # noqa: E731
        total = jax.lax.map(row, jax.tree.map(jnp.asarray, batch))
        return jnp.sum(jax.lax.stop_gradient(chance) * total.sum) / 2  # two responses a row

    return jax.grad(expected)(policy.params)


def next_token(policy):
    hidden = policy(arrays(one_per_row([tree([1, 2], [[0]])], 3, 1, 1))).hidden[0, 1]
    return jax.nn.log_softmax(logits(policy.params, hidden))


def close(got, want):
    got, want = (np.concatenate([np.ravel(x) for k, x in sorted(t["layers"]["q"].items())]) for t in (got, want))
    assert np.abs(want).max() > 1e-5
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("kl", ["k1", "k3", "exact"])
def test_the_gradient_is_that_of_the_free_energy(small, kl):
    """E over samples of the loss's gradient is the gradient of F = sum_y pi (ln pi - ln E + precision G)."""
    policy, habit = small
    objective = efe(evaluation(), precision=1.7, online=Online(samples=2, new_tokens=1, kl=kl))
    G = -(UTILITY + 0.5 * jnp.square(UTILITY))

    def F(params):
        log_pi = next_token(policy.replace(params=params))
        return jnp.sum(jnp.exp(log_pi) * (log_pi - jax.lax.stop_gradient(next_token(habit)) + 1.7 * G))

    close(enumerated(objective, policy, habit), jax.grad(F)(policy.params))


def test_utility_alone_is_reward_maximisation_under_a_penalty(small):
    """With w_s = w_p = 0, grad F = - precision grad( E[u] - KL(pi || ref) / precision ): the objective of RLHF."""
    policy, habit = small
    objective = efe(evaluation(), precision=2.0, state_weight=0.0, online=Online(samples=2, new_tokens=1, kl="k1"))

    def J(params):
        log_pi = next_token(policy.replace(params=params))
        pi, log_ref = jnp.exp(log_pi), jax.lax.stop_gradient(next_token(habit))
        return jnp.sum(pi * UTILITY) - jnp.sum(pi * (log_pi - log_ref)) / 2.0

    want = jax.tree.map(lambda g: -2.0 * g, jax.grad(J)(policy.params))
    close(enumerated(objective, policy, habit), want)


def test_divergences_by_hand(small):
    """The exact divergence from explicit softmaxes; k1 and k3 have it as their mean over the policy's tokens."""
    policy, habit = small
    trees = [tree([1, 2], [[i]]) for i in range(VOCAB)]
    batch = arrays(one_per_row(trees, 3, 1, 1))
    facts = efe(evaluation(), online=Online(kl="exact")).prepare(habit, batch, jax.random.key(0))
    batch = batch._replace(extras=facts)
    log_p, log_q = next_token(policy), next_token(habit)
    want = float(jnp.sum(jnp.exp(log_p) * (log_p - log_q)))
    hidden, logps = policy(batch).hidden, token_logprobs(policy, batch)
    np.testing.assert_allclose(estimators.exact(policy, hidden, logps, batch), want, rtol=1e-4)
    for name in ("k1", "k3"):
        values = estimators.KL[name](policy, hidden, logps, batch)[:, 0]
        np.testing.assert_allclose(jnp.sum(jnp.exp(logps[:, 0]) * values), want, rtol=1e-3)


def test_baselines_by_hand():
    """Three samples of one prompt, two of the next, an only child; 9 stands in an empty slot."""
    batch = every_pair()
    group, ids = jnp.array([[0, 0, 0, 1, 1, 2, -1]]), jnp.array([[0, 1, 2, 3, 4, 5, -1]])
    batch = batch._replace(group=group, ids=ids)
    values = jnp.array([[1.0, 2.0, 6.0, 5.0, 3.0, 7.0, 9.0]])
    np.testing.assert_allclose(estimators.leave_one_out(values, batch)[0, :6], [-3, -1.5, 4.5, 2, -2, 0])
    plain = group_relative(values, batch, normalise=0.0)[0]
    np.testing.assert_allclose(plain[:6], [-2, -1, 3, 1, -1, 0], atol=1e-6)
    scaled = group_relative(values, batch, normalise=1.0)[0]
    np.testing.assert_allclose(scaled[:5], [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0.5**0.5, -(0.5**0.5)], rtol=1e-3)


def test_clipping_by_hand():
    ratio, gain = jnp.array([1.5, 1.5, 0.5, 0.5, 1.0]), jnp.array([1.0, -1.0, 1.0, -1.0, 2.0])
    got = estimators.clipped(ratio, gain, low=0.2, high=0.3)
    np.testing.assert_allclose(got, [1.3, -1.5, 0.5, -0.8, 2.0], rtol=1e-6)


def test_rollouts_are_the_samples(lm, base, rows):
    """The batch holds the prompt once and each sample as a branch; the sampler's log-probabilities are the model's."""
    prompts = prompts_of(rows, lm.tokenizer)
    batch, answers = roll(base, prompts, [0, 3], Rollouts(samples=3, new_tokens=6), jax.random.key(1))
    assert batch.ids.tolist() == [[0, 1, 2], [3, 4, 5]] and len(answers) == 6
    batch = arrays(batch)
    np.testing.assert_allclose(token_logprobs(base, batch), batch.extras["sampled_logps"], atol=2e-3)
    said = np.asarray(response_tokens(batch, 6))
    for k, answer in enumerate(answers):
        ids = [t for t in said[k // 3, k % 3].tolist() if t >= 0]
        assert lm.tokenizer.decode(ids, skip_special_tokens=True) == answer.content
        assert answer.prompt == rows[[0, 3][k // 3]].prompt
    assert set(np.asarray(asked_last(batch)).ravel().tolist()) == {prompts.ids[0][-1]}


def test_prompts_come_in_an_order_that_can_be_restored():
    prompts = Prompts(tuple((1, n) for n in range(5)), stop=0)
    order = prompts.order(2, seed=3)
    next(order)
    state = order.get_state()
    want = [next(order).tolist() for _ in range(4)]
    again = prompts.order(2, seed=3)
    again.set_state(state)
    assert [next(again).tolist() for _ in range(4)] == want


def test_online_objectives_keep_the_contract(lm):
    testing.check(efe(evaluation(), online=Online(samples=3, kl="exact")), lm)
    testing.check(grpo(evaluation(), options=GrpoOptions(samples=3, average="token")), lm)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="`ratings` knows the corpus's answers only"):
        Options(online={"samples": 2})
    with pytest.raises(BadInput, match="log-preferences C"):
        from aif.readers.ratings import ratings

        efe(ratings(2, 3))
