"""Scoring of responses: the chunked head and its gradient, packed rows, token trees, masks."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from aif.batches import build, once
from aif.models.decoder import Head, forward
from aif.objectives.logprobs import (
    Cut,
    gathered_logprobs,
    group_logsumexp,
    response_logprobs,
    response_sums,
    same_group,
    token_logprobs,
    vocabulary_kl,
)
from aif.objectives.sft import sft

M, D, V = 23, 8, 36
CUTS = [Cut(*cut) for cut in ((1, 36), (4, 9), (7, 1), (23, 4), (64, 18))]
TARGET = "discernment"


@pytest.fixture(scope="module")
def flat():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (M, D)), jax.random.normal(keys[1], (V, D))
    return hidden, head, jax.random.randint(keys[2], (M,), 0, V), jax.random.normal(keys[3], (M,))


def plain(hidden, head, targets, cap=None):
    logits = hidden @ head.T if cap is None else cap * jnp.tanh(hidden @ head.T / cap)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("cut", CUTS)
def test_gathered_logprobs_are_log_softmax(flat, cut):
    hidden, head, targets, _ = flat
    got = gathered_logprobs(hidden, head, targets, cut)
    np.testing.assert_allclose(got, plain(hidden, head, targets), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("cut", "cap"), [*((cut, None) for cut in CUTS), (CUTS[1], 1.5)])
def test_gradient_is_that_of_the_plain_formula(flat, cut, cap):
    """Frozen head (the slope is kept from the forward pass) and trained head (logits are rebuilt), under a loss that is
    not linear in the log-probabilities; the cap is Gemma 2's."""
    hidden, head, targets, weights = flat
    mine = lambda h, e: jnp.sum(weights * jnp.exp(gathered_logprobs(h, e, targets, cut, cap) / 4))  # noqa: E731
    theirs = lambda h, e: jnp.sum(weights * jnp.exp(plain(h, e, targets, cap) / 4))  # noqa: E731
    want = jax.jit(jax.grad(theirs, argnums=(0, 1)))(hidden, head)
    both = jax.jit(jax.grad(mine, argnums=(0, 1)))(hidden, head)
    np.testing.assert_allclose(both[0], want[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(both[1], want[1], rtol=0, atol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(mine))(hidden, head), want[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(mine, argnums=1))(hidden, head), want[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("tile", [1, 9, 36])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_kl_over_the_vocabulary_is_that_of_two_log_softmaxes(flat, tile, cap):
    """Values for two q of every p, and the gradients with respect to all four arguments."""
    p, head_p, _, weights = flat
    q, head_q = jnp.stack([p[::-1], 2 * p]), head_p[::-1] + 0.1
    logits = lambda h, e: h @ e.T if cap is None else cap * jnp.tanh(h @ e.T / cap)  # noqa: E731

    def plain_kl(p, head_p, q, head_q):
        log_p, log_q = (jax.nn.log_softmax(logits(*x)) for x in ((p, head_p), (q, head_q)))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    mine = lambda p, e, q, f: vocabulary_kl(p, Head(e, cap), q, Head(f, cap), tile)  # noqa: E731
    parts = (p, head_p, q, head_q)
    np.testing.assert_allclose(jax.jit(mine)(*parts), jax.jit(plain_kl)(*parts), rtol=2e-6, atol=2e-6)
    slopes = [jax.jit(jax.grad(lambda *x, f=f: jnp.sum(weights * f(*x)), range(4)))(*parts) for f in (mine, plain_kl)]
    for got, want in zip(*slopes, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("vocab", [49152, 151936, 128256, 262144, 200064, 50257, 32064])
def test_tiles_divide_the_vocabulary_and_keep_few_logits(vocab):
    for positions in (1, 300, 5000):
        cut = Cut.of(Head(jnp.zeros((vocab, 1))), positions)
        assert vocab % cut.tile == 0
        assert min(cut.positions, positions) * cut.tile <= 2**22
    assert Cut.of(Head(jnp.zeros((vocab, 1)), whole=True), 5000) == Cut(256, vocab)


def test_a_prime_vocabulary_is_not_cut():
    assert Cut.of(Head(jnp.zeros((49157, 1))), 5000) == Cut(256, 49157)


def test_gradient_against_finite_differences(flat):
    hidden, head, targets, weights = flat
    loss = lambda h, e: jnp.mean(weights * gathered_logprobs(h, e, targets, Cut(7, 12)))  # noqa: E731
    check_grads(jax.jit(loss), (hidden, head), order=1, modes=["rev"], atol=2e-3, rtol=2e-3)


def test_extreme_logits_stay_finite():
    hidden, head = jnp.array([[1e4, 0.0]]), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    got, slope = jax.value_and_grad(lambda h: gathered_logprobs(h, head, jnp.array([1]), Cut(4, 1))[0])(hidden)
    np.testing.assert_allclose(got, -2e4)
    np.testing.assert_allclose(slope, [[-2.0, 0.0]])


def data_of(rows, lm, which="all", length=384):
    return build(rows, lm.tokenizer, which=which, length=length, target=TARGET)


score = jax.jit(response_logprobs)


def by_response(policy, data, rows=2):
    """ln p of every response of a data set, in order."""
    out = np.full(len(data.owners), np.nan)
    for batch in once(data, rows=rows):
        got, filled = np.asarray(score(policy, batch)), batch.ids >= 0
        assert (got[~filled] == 0).all()
        out[batch.ids[filled]] = got[filled]
    return out


def alone(rows):
    """Every candidate as a prompt of its own, in the order that `build` gives responses."""
    order = lambda row: sorted(row.candidates, key=lambda c: c.stance != TARGET)  # noqa: E731
    return [replace(row, candidates=(c,)) for row in rows for c in order(row)]


def test_packed_trees_score_each_response_as_a_text_of_its_own(base, adapter, lm, rows):
    """Prompt and answer as one plain row, no packing and no tree: ln p by the full softmax, to 1e-5 a token."""
    policy, length = base.replace(adapter=adapter), 128
    data = data_of(rows, lm)
    tokens, spans = [], []
    for example in data.examples:
        prompt = example["tokens"][example["branches"] == 0]
        for k in range(len(example["ids"])):
            answer = example["tokens"][example["branches"] == k + 1]
            text = np.concatenate([prompt, answer])
            tokens.append(np.pad(text, (0, length - len(text))))
            spans.append((len(prompt), len(text)))
    stack = jnp.array(np.stack(tokens))
    hidden = jax.jit(lambda p, t: forward(p.config, p.params, t, adapter=p.adapter).hidden)(policy, stack)
    full = np.asarray(jax.nn.log_softmax(hidden @ policy.head.weight.T))
    want = [sum(full[n, t - 1, tokens[n][t]] for t in range(start, end)) for n, (start, end) in enumerate(spans)]
    got = by_response(policy, data)
    counts = np.array([end - start for start, end in spans])
    assert len(want) == 32
    np.testing.assert_allclose(got / counts, np.array(want) / counts, rtol=0, atol=1e-5)


def test_one_response_a_row_scores_like_packed_rows(base, adapter, lm, rows):
    """Packed == padded: the same responses with one example to a row."""
    policy = base.replace(adapter=adapter)
    packed, single = data_of(rows[:4], lm, "target"), data_of(rows[:4], lm, "target", length=96)
    assert len(list(once(single, rows=4))) == 1
    np.testing.assert_allclose(by_response(policy, packed, 1), by_response(policy, single, 4), rtol=2e-6, atol=0)


def test_a_shared_prefix_is_the_candidates_apart(base, adapter, lm, rows):
    """Values, and the adapter's gradient of a weighted sum over responses."""
    tree, apart = data_of(rows[:2], lm), data_of(alone(rows[:2]), lm, "target")
    policy = base.replace(adapter=adapter)
    np.testing.assert_allclose(by_response(policy, tree), by_response(policy, apart), rtol=2e-6, atol=0)
    weights = np.random.default_rng(0).normal(size=len(tree.owners)).astype(np.float32)

    @jax.jit
    def gradient(adapter, batch, weights):
        def loss(adapter):
            picked = jnp.where(batch.ids >= 0, weights[batch.ids], 0.0)
            return jnp.sum(picked * response_logprobs(base.replace(adapter=adapter), batch))

        return jax.grad(loss)(adapter)

    def total(data):
        return jax.tree.map(lambda *x: sum(x), *(gradient(adapter, batch, weights) for batch in once(data, rows=2)))

    got = total(tree)
    for name, want in total(apart).items():
        for leaf in ("a", "b"):
            size = float(jnp.abs(want[leaf]).max())
            assert size > 1e-2
            np.testing.assert_allclose(got[name][leaf], want[leaf], rtol=0, atol=2e-5 * size)


def test_masking_tokens_is_dropping_them(base, lm, rows):
    """Weight 0 on a response's last five tokens takes exactly their log-probabilities out of the sum."""
    batch = next(once(data_of(rows, lm), rows=2))
    logps = np.asarray(jax.jit(token_logprobs)(base, batch))
    mine = np.flatnonzero((batch.response[0] == 1) & (batch.weights[0] > 0))
    weights = batch.weights.copy()
    weights[0, mine[-5:]] = 0
    before, after = (np.asarray(response_sums(jnp.asarray(logps), b)) for b in (batch, batch._replace(weights=weights)))
    np.testing.assert_allclose(after[0, 1], logps[0, mine[:-5]].sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(after[0], 1), np.delete(before[0], 1))
    np.testing.assert_array_equal(after[1], before[1])


def test_a_row_of_weight_zero_is_a_row_left_out(base, lm, rows):
    """Cross-entropy over a data set with tier weights (1, 0, 2, 1) against the rows repeated that often."""
    loss = jax.jit(sft().loss)

    def mean(rows, weights=None):
        data = build(rows, lm.tokenizer, which="target", length=384, target=TARGET, weights=weights)
        totals = [loss(base, batch).total for batch in once(data, rows=1)]
        return float(sum(t.sum for t in totals)), float(sum(t.weight for t in totals))

    got = mean(rows[:4], [1.0, 0.0, 2.0, 1.0])
    want = mean([rows[0], rows[2], rows[2], rows[3]])
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_groups_and_their_logsumexp(lm, rows):
    """Against explicit sums over the responses that answer the same prompt; empty slots give 0 and no NaN slope."""
    batch = jax.tree.map(jnp.asarray, next(once(data_of(rows, lm), rows=2)))
    values = jax.random.normal(jax.random.key(0), batch.ids.shape)
    want, same = np.zeros(batch.ids.shape), np.zeros((*batch.ids.shape, batch.ids.shape[1]), bool)
    for b, r in np.argwhere(np.asarray(batch.ids) >= 0):
        same[b, r] = (batch.group[b] == batch.group[b, r]) & (batch.ids[b] >= 0)
        want[b, r] = np.log(np.exp(np.asarray(values[b])[same[b, r]]).sum())
    assert (batch.ids < 0).any() and same.sum() == 16 * (batch.ids >= 0).sum() / 4
    np.testing.assert_array_equal(same_group(batch), same)
    np.testing.assert_allclose(group_logsumexp(values, batch), want, rtol=0, atol=1e-6)
    slope = jax.grad(lambda v: jnp.sum(group_logsumexp(v, batch)))(values)
    assert np.isfinite(slope).all() and (np.asarray(slope)[batch.ids < 0] == 0).all()
    np.testing.assert_allclose(slope.sum(), (batch.ids >= 0).sum(), rtol=1e-6)
