"""Narrow fine-tuning: the divergence outside, rows of two kinds, the sum of two means, the switch, what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif import testing
from aif.adapter import steering_vector
from aif.api import fit
from aif.batches import build, once
from aif.errors import BadInput
from aif.models.decoder import logits
from aif.objectives import Context
from aif.objectives.narrow import Options, divergence_outside, make, narrow
from aif.objectives.online import divergence
from aif.objectives.sft import sft
from aif.plugins import plugin
from aif.sources import Offline, tokens_of
from aif.train import Optimizer, _shares, as_partial, start_state, train_step

CALM = Optimizer(learning_rate=1e-2, schedule="constant", clip=0.0).values(0, 1)


@pytest.fixture(scope="module")
def data(lm, rows):
    """Three prompts inside, of unlike weight, and three outside; a row holds two."""
    make = lambda some: build(  # noqa: E731
        some, lm.tokenizer, which="target", length=192, target="discernment", weights=[1.0, 2.0, 4.0]
    )
    return replace(make(rows[:3]), beside=make(rows[3:6]))


@pytest.fixture(scope="module")
def batch(data, base):
    """Two micro-batches of a row inside and a row outside, with the reference's residual."""
    source = Offline(data, narrow(), base, rows=1, accumulate=2, seed=0, position=None)
    return jax.tree.map(jnp.asarray, source(base, 0))


# The loss


def test_divergence_outside_by_hand(base, adapter, data):
    """Mean over all tokens of KL(ref || policy), from the whole logits; prompt tokens count, padding does not."""
    rows = jax.tree.map(jnp.asarray, next(once(data.beside, rows=1)))
    policy = base.replace(adapter=adapter)
    log_p, log_q = (jax.nn.log_softmax(logits(p.params, p(rows).hidden)) for p in (base, policy))
    there = np.asarray(rows.segments) > 0
    assert 0 < there.sum() < there.size and (np.asarray(rows.branches)[there] == 0).any()
    want = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))[there]
    got = divergence_outside(policy, base(rows).hidden, rows)
    np.testing.assert_allclose(got.value, want.mean(), rtol=1e-4)
    np.testing.assert_allclose(got.weight, there.sum())
    np.testing.assert_allclose(divergence_outside(base, base(rows).hidden, rows).value, 0.0, atol=1e-6)


def test_positions_that_are_not_asked_for_cost_nothing_and_change_nothing(toy):
    """300 positions in two chunks, all but five of the first one left out: those five agree with the whole."""
    p, q = (jax.random.normal(jax.random.key(k), (1, 300, 16)) for k in (0, 1))
    asked = jnp.zeros((1, 300), bool).at[0, 3:8].set(True)
    whole = divergence(p, q, toy.head, toy.head)
    some = divergence(p, q, toy.head, toy.head, asked=asked)
    np.testing.assert_allclose(some[0, 3:8], whole[0, 3:8], rtol=1e-6)
    assert (np.asarray(some)[0, 256:] == 0).all()
    slope = jax.grad(lambda q: jnp.sum(jnp.where(asked, divergence(p, q, toy.head, toy.head, asked=asked), 0)))(q)
    want = jax.grad(lambda q: jnp.sum(jnp.where(asked, divergence(p, q, toy.head, toy.head), 0)))(q)
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_the_contract(lm):
    testing.check(narrow(2.0), lm)


# Rows of two kinds, and a sum of two means


def test_every_micro_batch_has_both_kinds(data, base, batch):
    assert batch.tokens.shape[:2] == (2, 1) and batch.beside.tokens.shape[:2] == (2, 1)
    assert batch.extras["reference_hidden"].shape[:2] == (2, 1)
    inside, outside = ({tuple(e["tokens"]) for e in d.examples} for d in (data, data.beside))
    for part, known in ((batch, inside), (batch.beside, outside)):
        for tokens, segments in zip(np.asarray(part.tokens)[:, 0], np.asarray(part.segments)[:, 0], strict=True):
            assert all(tuple(tokens[segments == s]) in known for s in set(segments[segments > 0].tolist()))
    assert tokens_of(batch) == sum(int((x.segments > 0).sum()) for x in (batch, batch.beside))


def test_the_order_can_be_restored(data, base):
    make = partial(Offline, data, narrow(), base, rows=1, accumulate=1, seed=3)
    source = make(position=None)
    source(base, 0)
    at = source.position()
    want, got = source(base, 1), make(position=at)(base, 1)
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def vector(base):
    """A trained vector after layer 1."""
    fresh = steering_vector(base.config, layers=[1])["vector"]
    return {"vector": {**fresh, "u": 0.3 * jax.random.normal(jax.random.key(4), fresh["u"].shape)}}


def stepped(base, vector, batch, weight):
    """The gradient and the log of a step."""
    state = start_state(vector, jax.random.key(0))
    state, log = train_step(state, base, batch, as_partial(narrow(weight).loss), CALM, full=False)
    return np.asarray(state.optimizer[1].mu["vector"]["u"]) / 0.1, log  # the first moment is (1 - b1) g


def summed(objective, base, batch):
    """S1 / W1 + S2 / W2 over both micro-batches, differentiated by the vector."""

    def whole(trainable):
        policy = base.replace(adapter=trainable)
        found = [objective.loss(policy, jax.tree.map(itemgetter(a), batch)) for a in (0, 1)]
        means = zip(*(f.means for f in found), strict=True)
        return sum(sum(m.sum for m in pair) / sum(m.weight for m in pair) for pair in means)

    return jax.jit(jax.value_and_grad(whole))


def test_accumulation_is_exact_for_a_sum_of_means(base, batch, vector):
    """Two micro-batches of unlike weights."""
    weights = np.asarray(batch.weights.sum(axis=(1, 2)))
    assert weights[0] != weights[1]
    value, slope = summed(narrow(3.0), base, batch)(vector)
    gradient, log = stepped(base, vector, batch, 3.0)
    np.testing.assert_allclose(log["loss"].value, value, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope["vector"]["u"], rtol=1e-3, atol=1e-6)


def test_nothing_but_sft_without_lambda(base, batch, vector):
    gradient, log = stepped(base, vector, batch, 0.0)
    value, slope = summed(sft(), base, batch)(vector)
    np.testing.assert_allclose(log["loss"].value, value, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope["vector"]["u"], rtol=1e-3, atol=1e-6)
    assert log["kl_outside"].value > 1e-4


def test_the_weights_of_a_step_need_no_forward_pass(base, batch):
    """Compiled, what each sum is divided by holds no matrix product."""
    loss = as_partial(narrow(3.0).loss)
    compiled = jax.jit(lambda policy, batch: _shares(lambda b: loss(policy, b), batch)).lower(base, batch).compile()
    text = compiled.as_text()
    assert text is not None and " dot(" not in text and "custom-call" not in text
    inside, outside = compiled(base, batch)
    np.testing.assert_allclose([inside, outside], [batch.weights.sum(), (batch.beside.segments > 0).sum()])


# The switch


@pytest.mark.parametrize("at,steps,before", [(0.5, 10, 5), (3, 10, 3), (1, 2, 1), (0.25, 10, 3)])
def test_lambda_switches_after_so_many_steps(at, steps, before):
    options = Options.model_validate({"lambda": 2.0, "switch": {"at": at, "lambda": 0.5}})
    objective = make(options, Context((), (), np.zeros((0, 0)), np.zeros((0, 0)), steps=steps))
    assert objective.schedule is not None
    used = [as_partial(objective.schedule(n / max(1, steps - 1))).keywords["weight"] for n in range(steps)]
    assert used == [2.0] * before + [0.5] * (steps - before)


def config(**changes):
    tree = {
        "model": {"source": "tiny-random", "remat": "none"},
        "corpus": {"path": "bundled:tiny", "domains": ["bike"]},
        "batch": {"rows": 1, "length": 384},
        "adapter": {"kind": "vector", "layers": [1]},
        "arms": {
            "narrow": {"objective": {"name": "narrow", "lambda": 3.0, "switch": {"at": 2, "lambda": 0}}, "steps": 4}
        },
        "log": {"tensorboard": False},
    }
    return {**tree, **changes}


def test_a_run_switches_without_compiling_again():
    size = train_step._cache_size  # pyright: ignore[reportFunctionMemberAccess]
    before = size()
    lines = fit(config()).provenance["log"]
    assert size() == before + 1
    assert lines[0]["kl_outside"] < 1e-9  # the reference is the policy that the stage starts from
    assert [line["penalty"] > 0 for line in lines] == [False, True, False, False]
    np.testing.assert_allclose(lines[1]["penalty"], 3 * lines[1]["kl_outside"], rtol=1e-5)
    np.testing.assert_allclose(lines[1]["loss"], lines[1]["cross_entropy"] + lines[1]["penalty"], rtol=1e-6)


# What is refused


def narrow_arm(**options):
    return {"narrow": {"objective": {"name": "narrow", **options}, "steps": 4}}


REFUSED = {
    "corpus.domains: narrow needs the domains": {"corpus": {"path": "bundled:tiny"}},
    "no training rows outside of corpus.domains": {
        "corpus": {"path": "bundled:tiny", "domains": ["bike", "cat", "tea"]}
    },
    "no training rows of 'cats' .* there are cat, tea": {"arms": narrow_arm(domains=["cats"])},
    "switch.at: 4 leaves no step of 4": {"arms": narrow_arm(switch={"at": 4, "lambda": 1})},
    "unknown key, did you mean 'lambda'": {"arms": narrow_arm(lambd=1)},
    "switch.*unknown key.*keys here are at, lambda": {"arms": narrow_arm(switch={"at": 1, "lamda": 1, "lambda": 1})},
    "frozen head, which adapter.kind=full would train": {"adapter": {"kind": "full"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_narrow_is_refused(message):
    with pytest.raises(BadInput, match=message):
        fit(config(**REFUSED[message]))


def test_lambda_is_read_by_its_name():
    _, options = plugin("objectives", "narrow", {"lambda": 2.5}, "here")
    assert options.weight == 2.5
