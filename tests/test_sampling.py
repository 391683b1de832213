"""Generation: the cached loop against an uncached one, steering scopes, stopping, temperature."""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import one_per_row
from aif.errors import BadInput
from aif.models.decoder import DecoderConfig, forward, logits
from aif.models.module import random_params
from aif.objectives.logprobs import token_logprobs
from aif.policy import Policy
from aif.sampling import degeneration, generate
from aif.steering import add, clamp, parse_scope, reach
from aif.tokens import tree

NEW = 12
LENGTHS = [1, 5, 32, 33]  # one bucket is 32 tokens: the longest needs a second one
NEVER = 10_000  # a stop token that no model emits
ROOM = 64


@pytest.fixture(scope="module")
def prompts(toy):
    draw = np.random.default_rng(0)
    return [draw.integers(0, toy.config.vocab, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def edits(toy):
    c = toy.config
    direction = jax.random.normal(jax.random.key(1), (c.layers, c.width))
    return add(direction, jnp.array([2.0, -2.0, 1.0, 0.5]), jnp.ones(c.layers), layers=[0, 2])


@partial(jax.jit, static_argnames="new")
def _scores(policy, tokens, masks, *, new):
    edits = None if policy.edits is None else policy.edits._replace(mask=masks)
    hidden = forward(policy.config, policy.params, tokens, adapter=policy.adapter, edits=edits).hidden
    return logits(policy.params, hidden)


def mask_of(lengths, scope):
    """Which positions of right-padded rows an edit with this scope applies to."""
    at = np.arange(ROOM)[None]
    is_prompt = at < np.array(lengths)[:, None]
    return np.where(is_prompt, scope in ("all", "prompt"), scope in ("all", "response")).astype(np.float32)


def slow_greedy(policy, prompts, scope):
    """Argmax of a whole uncached forward pass, right-padded, once per new token."""
    texts = [list(p) for p in prompts]
    logps = np.zeros((len(prompts), NEW))
    for step in range(NEW):
        tokens = np.stack([np.pad(t, (0, ROOM - len(t))) for t in texts])
        scores = np.asarray(_scores(policy, tokens, mask_of([len(p) for p in prompts], scope), new=NEW))
        for row, text in enumerate(texts):
            last = scores[row, len(text) - 1]
            text.append(int(last.argmax()))
            logps[row, step] = last.max() - np.log(np.exp(last - last.max()).sum()) - last.max()
    return np.array([t[len(p) :] for t, p in zip(texts, prompts, strict=True)]), logps


@pytest.mark.parametrize("scope", ["prompt", "response", "all"])
def test_greedy_is_the_uncached_argmax_loop(toy, toy_adapter, prompts, edits, scope):
    """Token for token: four prompt lengths in one batch, an adapter, and edits with a dose per row."""
    policy = toy.replace(adapter=toy_adapter, edits=edits, reach=reach(scope))
    made = generate(policy, prompts, new_tokens=NEW, stop=NEVER)
    tokens, logps = slow_greedy(policy, prompts, scope)
    np.testing.assert_array_equal(made.tokens, tokens)
    np.testing.assert_allclose(made.logps, logps, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(made.lengths, [NEW] * 4)
    assert len(set(map(tuple, tokens.tolist()))) > 1


def test_a_prompt_answers_the_same_alone(toy, prompts):
    """Neighbours and padding in a batch do not matter."""
    together = generate(toy, prompts, new_tokens=NEW, stop=NEVER)
    for row in (0, 3):
        single = generate(toy, [prompts[row]], new_tokens=NEW, stop=NEVER)
        np.testing.assert_array_equal(single.tokens[0], together.tokens[row])
        np.testing.assert_allclose(single.logps[0], together.logps[row], rtol=0, atol=2e-5)


def test_generation_ends_at_the_stop_token(toy, prompts):
    """A stop token that row 0 emits at a known step: what came before it is unchanged, what follows is padding."""
    free = generate(toy, prompts, new_tokens=NEW, stop=NEVER)
    stop = int(free.tokens[0, 3])
    made = generate(toy, prompts, new_tokens=NEW, stop=stop)
    for row in range(4):
        seen = np.flatnonzero(np.asarray(free.tokens[row]) == stop)
        length = int(seen[0]) + 1 if len(seen) else NEW
        assert int(made.lengths[row]) == length
        np.testing.assert_array_equal(made.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(made.tokens[row, length:], stop)
        np.testing.assert_array_equal(made.logps[row, length:], 0.0)
    assert int(made.lengths[0]) <= 4


def counting_policy(dose: float) -> Policy:
    """Every embedding is (1, 0, 0, 0). The edit adds `dose` to coordinate 1 after layer 0; layer 1 attends to all
    positions alike and copies its mean of coordinate 1 into coordinate 2, which is the logit of token 0."""
    c = DecoderConfig("toy", vocab=3, width=4, layers=2, heads=1, kv_heads=1, head_dim=4, ff=4, tied=False)
    params = jax.tree.map(jnp.zeros_like, random_params(c))
    layers = params["layers"]
    layers = {**layers, "attn_norm": jnp.ones((2, 4)), "mlp_norm": jnp.ones((2, 4))}
    layers["v"] = {"w": layers["v"]["w"].at[1, 1, 0].set(1.0)}
    layers["o"] = {"w": layers["o"]["w"].at[1, 0, 2].set(1.0)}
    embed, head = params["embed"].at[:, 0].set(1.0), params["head"].at[0, 2].set(1.0).at[2, 0].set(-3.0)
    direction = jnp.zeros((2, 4)).at[:, 1].set(1.0)
    edits = add(direction, jnp.full(2, dose), jnp.ones(2), layers=[0])
    return Policy({"embed": embed, "head": head, "norm": jnp.ones(4), "layers": layers}, None, edits, config=c)


SCOPES = ["prompt", "response", "all", "last", [0, 2], [slice(1, 4)], [1, slice(4, None)]]


def acts(scope, place: int, length: int) -> bool:
    """Whether the token at `place` of a text is steered, where the prompt is `length` tokens long."""
    if isinstance(scope, str):
        first = {"all": 0, "prompt": 0, "response": length, "last": length - 1}[scope]
        return place >= first and (scope != "prompt" or place < length)
    return any(place in range(s.start, s.stop or 99) if isinstance(s, slice) else place == s for s in scope)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_scope_names_the_positions_that_are_steered(scope):
    """The log-probability of token t tells how many of the positions before it were steered, in the prompt that is read
    at once and in the answer that is decoded token by token; and scoring the same answer steers the same positions.

    With k of n positions steered, coordinate 2 is c k/n, where c = 1/rms(1, 1, 0, 0) = sqrt 2 is what a steered
    position shows after the norm; the last residual is (1, e, c k/n, 0), e = 1 where the last position is steered.
    """
    steps, prompts = 4, [[0] * 3, [1] * 5]
    policy = counting_policy(1.0).replace(reach=reach(scope))
    made = generate(policy, prompts, new_tokens=steps, stop=NEVER)
    for row, prompt in enumerate(prompts):
        for t in range(steps):
            on = [acts(scope, place, len(prompt)) for place in range(len(prompt) + t)]
            r = np.array([1.0, on[-1], np.sqrt(2 / (1 + 2e-5)) * np.mean(on), 0.0])
            h = r / np.sqrt((r**2).mean() + 1e-5)
            want = h[2] - np.log(np.exp(h[2]) + 1 + np.exp(-3 * h[0]))
            np.testing.assert_allclose(made.logps[row, t], want, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(made.tokens, 0)
    trees = [tree(prompt, [[0] * steps, [2, 0, 0]]) for prompt in prompts]
    batch = jax.tree.map(jnp.asarray, one_per_row(trees, 12, 7, 2))
    np.testing.assert_allclose(token_logprobs(policy, batch)[:, :steps], made.logps, rtol=0, atol=2e-6)


def test_scopes_that_cannot_be(toy, prompts, edits):
    for scope in ("none", [-1], [slice(3, 3)], [slice(0, 9, 2)], []):
        with pytest.raises(BadInput, match="scope: "):
            reach(scope)
    far = toy.replace(edits=edits, reach=reach([1, 4]))  # the shortest prompt is one token, and three are asked for
    with pytest.raises(BadInput, match=r"scope: position 4 is out of range; the shortest text has positions 0\.\.3"):
        generate(far, prompts, new_tokens=3, stop=NEVER)


def test_scopes_as_the_command_line_writes_them():
    assert [parse_scope(text) for text in ("all", "last", "3", "0,5:8,12:", ":4")] == [
        "all",
        "last",
        [3],
        [0, slice(5, 8), slice(12, None)],
        [slice(None, 4)],
    ]
    for text in ("", "nothing", "1,,2", "1:2:3", "a:b"):
        with pytest.raises(BadInput, match="scope: .* is none"):
            parse_scope(text)


def test_edits_change_without_compiling_again(toy, toy_adapter, prompts):
    """A clamp in the place of a push, and other doses, reuse the compiled loop."""
    from aif.sampling import _generate

    c, toy = toy.config, toy.replace(adapter=toy_adapter)
    direction = jax.random.normal(jax.random.key(2), (c.layers, c.width))
    norms = jnp.ones(c.layers)
    first = generate(toy.replace(edits=add(direction, jnp.ones(4), norms, layers=[1])), prompts, new_tokens=3, stop=1)
    compiled = _generate._cache_size()
    generate(toy.replace(edits=clamp(direction, jnp.arange(4.0), norms, layers=[2])), prompts, new_tokens=3, stop=2)
    assert _generate._cache_size() == compiled
    assert first.tokens.shape == (4, 3)


def test_temperature_draws_from_the_tempered_softmax(toy):
    """4000 draws of one token: frequencies within 4 standard errors of softmax(logits / 0.7); log-probabilities are at
    temperature 1; the key decides the draw."""
    n, warm = 4000, 0.7
    prompt = [3, 1, 4]
    scores = np.asarray(logits(toy.params, forward(toy.config, toy.params, jnp.array([prompt])).hidden))[0, -1]
    log_p = np.asarray(jax.nn.log_softmax(scores))
    sample = partial(generate, toy, [prompt] * n, new_tokens=1, stop=NEVER, temperature=warm)
    made = sample(key=jax.random.key(0))
    drawn = np.asarray(made.tokens[:, 0])
    np.testing.assert_allclose(made.logps[:, 0], log_p[drawn], rtol=0, atol=1e-5)
    p = np.asarray(jax.nn.softmax(scores / warm))
    share = np.bincount(drawn, minlength=len(p)) / n
    assert (np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / n) + 1 / n).all()
    np.testing.assert_array_equal(sample(key=jax.random.key(0)).tokens, made.tokens)
    assert (np.asarray(sample(key=jax.random.key(1)).tokens) != made.tokens).any()


def test_sampled_logps_are_the_policys(toy, toy_adapter, prompts, edits):
    """Teacher forcing of what was sampled gives the log-probabilities that sampling reported."""
    policy = toy.replace(adapter=toy_adapter, edits=edits)
    made = generate(policy, prompts, new_tokens=NEW, stop=NEVER, temperature=1.3, key=jax.random.key(4))
    texts = [[*p, *np.asarray(t).tolist()] for p, t in zip(prompts, made.tokens, strict=True)]
    tokens = np.stack([np.pad(t, (0, ROOM - len(t))) for t in texts])
    log_p = np.asarray(jax.nn.log_softmax(_scores(policy, tokens, mask_of(LENGTHS, "all"), new=NEW)))
    for row, length in enumerate(LENGTHS):
        want = [log_p[row, length + t - 1, texts[row][length + t]] for t in range(NEW)]
        np.testing.assert_allclose(made.logps[row], want, rtol=0, atol=2e-5)


def test_samples_share_the_reading_of_their_prompt(toy, toy_adapter, prompts):
    """Three samples of each prompt are what three copies of it give, edits per prompt included."""
    c, keys = toy.config, jax.random.split(jax.random.key(9), 12)
    direction = jax.random.normal(jax.random.key(1), (c.layers, c.width))
    some = partial(add, direction, norms=jnp.ones(c.layers), layers=[1])
    doses = jnp.array([2.0, -2.0, 1.0, 0.5])
    draw = partial(generate, new_tokens=NEW, stop=NEVER, temperature=1.0, top_p=0.9, key=keys)
    shared = draw(toy.replace(adapter=toy_adapter, edits=some(doses)), prompts, samples=3)
    copied = [p for p in prompts for _ in range(3)]
    apart = draw(toy.replace(adapter=toy_adapter, edits=some(jnp.repeat(doses, 3))), copied)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    np.testing.assert_allclose(shared.logps, apart.logps, rtol=0, atol=2e-5)
    assert len({tuple(t) for t in shared.tokens.tolist()}) > 4


def test_a_sample_depends_on_its_key_alone(toy, prompts):
    """Drawn in a batch, alone, and at another place of a batch."""
    keys = jax.random.split(jax.random.key(3), 4)
    draw = partial(generate, toy, new_tokens=NEW, stop=NEVER, temperature=1.0)
    together = draw(prompts, key=keys)
    turned = draw(prompts[::-1], key=keys[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], together.tokens)
    np.testing.assert_array_equal(draw(prompts[2:3], key=keys[2:3]).tokens[0], together.tokens[2])


def test_layers_in_a_loop_or_a_scan(toy, toy_adapter, prompts, edits, monkeypatch):
    """Weights and cache apart, or stacked as on an accelerator: the same tokens."""
    policy = toy.replace(adapter=toy_adapter, edits=edits)
    want = generate(policy, prompts, new_tokens=NEW, stop=NEVER)
    monkeypatch.setattr("aif.sampling.unrolled", lambda: False)
    made = generate(policy, prompts, new_tokens=NEW, stop=NEVER)
    np.testing.assert_array_equal(made.tokens, want.tokens)
    np.testing.assert_allclose(made.logps, want.logps, rtol=0, atol=2e-5)


def test_any_of_several_stop_tokens_ends_a_row(toy, prompts):
    """The first of two that a row emits ends it; the padding is the first of the list."""
    free = np.asarray(generate(toy, prompts, new_tokens=NEW, stop=NEVER).tokens)
    stops = [int(free[0, 3]), int(free[1, 2])]
    made = generate(toy, prompts, new_tokens=NEW, stop=stops)
    for row in range(4):
        seen = np.flatnonzero(np.isin(free[row], stops))
        length = int(seen[0]) + 1 if len(seen) else NEW
        assert int(made.lengths[row]) == length
        np.testing.assert_array_equal(made.tokens[row, :length], free[row, :length])
        np.testing.assert_array_equal(made.tokens[row, length:], stops[0])


def test_lengths_are_few(toy):
    """Prompts of 1 to 200 tokens and answers of 1 to 90 meet 6 and 3 lengths: that bounds the compilations."""
    from aif.sampling import _generate, bucket

    assert [bucket(n) for n in (1, 32, 33, 65, 97, 129, 193, 257, 1025)] == [32, 32, 64, 96, 128, 192, 256, 384, 1536]
    assert len({bucket(n) for n in range(1, 100_001)}) == 24
    before = _generate._cache_size()
    for length, new in ((40, 1), (64, 2), (33, 5), (50, 32), (5, 33), (6, 40)):
        generate(toy, [[1] * length] * 2, new_tokens=new, stop=0)
    assert _generate._cache_size() - before == 2


def test_filters_change_without_compiling_again(toy, prompts):
    from aif.sampling import _generate

    draw = partial(generate, toy, prompts, new_tokens=3, stop=NEVER)
    greedy = draw()
    compiled = _generate._cache_size()
    np.testing.assert_array_equal(draw(temperature=1.0, top_k=1).tokens, greedy.tokens)
    np.testing.assert_array_equal(draw(temperature=0.5, top_p=1e-6, min_p=0.2).tokens, greedy.tokens)
    assert _generate._cache_size() == compiled


@pytest.mark.parametrize(
    "prompts,options", [([], {}), ([[1], []], {}), ([[1]], {"new_tokens": 0}), ([[1]], {"samples": 0})]
)
def test_nothing_to_continue_is_refused(toy, prompts, options):
    with pytest.raises(BadInput, match="at least one prompt"):
        generate(toy, prompts, **{"new_tokens": 1, "stop": 0, **options})


def test_degeneration_by_hand():
    """Ids 1 2 1 2 1 2 1: four 4-grams, two of them distinct, so half were seen before."""
    found = degeneration("abab", [1, 2, 1, 2, 1, 2, 1])
    assert found["repetition"] == 0.5
    assert found["compression"] == len(zlib.compress(b"abab")) / 4
    assert degeneration("ab", [1, 2, 3])["repetition"] == 0.0
    assert degeneration("", []) == {"repetition": 0.0, "compression": 1.0}
    assert degeneration("la " * 200, list(range(4)) * 50)["compression"] < 0.05
