"""The decoder's forward, its layers, and the values that travel beside the weights."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.adapter import lora, merge, steering_vector
from aif.errors import BadInput
from aif.models.decoder import empty_cache, forward, logits
from aif.models.layers import attention, product, rms_norm, rotary_angles, visible
from aif.models.module import Decoder, random_params
from aif.steering import add, clamp, project_out
from aif.types import Edits

B, T = 2, 11


@pytest.fixture(scope="module")
def tokens(toy):
    return jax.random.randint(jax.random.key(0), (B, T), 0, toy.config.vocab)


@pytest.fixture(scope="module")
def layout():
    """Row 0: a prompt of three with answers of three and two, another prompt of two, one padding. Row 1: one text."""
    segments = [[1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 0], [1] * 11]
    branches = [[0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0], [0] * 11]
    positions = [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 0], list(range(11))]
    return {k: jnp.array(v) for k, v in (("segments", segments), ("branches", branches), ("positions", positions))}


def residual(h):
    return h


_jitted = jax.jit(forward, static_argnums=0, static_argnames=("tap", "remat", "compute_dtype"))


def run(toy, tokens, **values):
    return _jitted(toy.config, toy.params, tokens, tap=residual, **values)


def norm64(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def frequencies(c):
    """The Llama 3.1 rule for scaled rotary frequencies, one at a time."""
    _, factor, low, high, original = c.rope_scaling
    out = []
    for i in range(c.head_dim // 2):
        f = c.rope_theta ** (-2 * i / c.head_dim)
        wavelength = 2 * math.pi / f
        if wavelength > original / low:
            f = f / factor
        elif wavelength >= original / high:
            smooth = (original / wavelength - low) / (high - low)
            f = (1 - smooth) * f / factor + smooth * f
        out.append(f)
    return np.array(out)


def turned(x, angle):
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for i in range(half):
        c, s = np.cos(angle[:, i]), np.sin(angle[:, i])
        out[:, i], out[:, half + i] = x[:, i] * c - x[:, half + i] * s, x[:, half + i] * c + x[:, i] * s
    return out


def plain_forward(c, params, row, segments, branches, positions):
    """One row, in float64: a Python loop over layers, heads and queries. Returns residuals [L, T, D] and hidden."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = p["embed"][row]
    angle = positions[:, None] * frequencies(c)
    residuals = []
    for number in range(c.layers):
        w = jax.tree.map(lambda x: x[number], p["layers"])  # noqa: B023
        line = lambda x, name: x @ w[name]["w"] + w[name].get("b", 0.0)  # noqa: B023, E731
        x = norm64(h, w["attn_norm"], c.norm_eps)
        q, k, v = (line(x, name) for name in "qkv")
        mixed = np.zeros((len(row), c.heads * c.head_dim))
        for head in range(c.heads):
            mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
            shared = head // (c.heads // c.kv_heads)
            theirs = slice(shared * c.head_dim, (shared + 1) * c.head_dim)
            qh, kh, vh = turned(q[:, mine], angle), turned(k[:, theirs], angle), v[:, theirs]
            for t in range(len(row)):
                seen = [
                    s
                    for s in range(t + 1)
                    if segments[s] == segments[t] and (branches[s] == 0 or branches[s] == branches[t])
                ]
                scores = kh[seen] @ qh[t] / math.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max())
                mixed[t, mine] = weights / weights.sum() @ vh[seen]
        h = h + line(mixed, "o")
        x = norm64(h, w["mlp_norm"], c.norm_eps)
        gate = line(x, "gate")
        h = h + line(gate / (1 + np.exp(-gate)) * line(x, "up"), "down")
        residuals.append(h)
    return np.stack(residuals), norm64(h, p["norm"], c.norm_eps)


def test_forward_is_the_plain_loop_over_layers(toy, tokens, layout):
    """Scan, blocked attention, grouped heads, segments, branches and scaled rotary against float64 loops."""
    out = run(toy, tokens, **layout)
    for b in range(B):
        fields = (np.asarray(layout[name][b]) for name in ("segments", "branches", "positions"))
        residuals, hidden = plain_forward(toy.config, toy.params, np.asarray(tokens[b]), *fields)
        np.testing.assert_allclose(out.taps[:, b], residuals, rtol=0, atol=2e-5)
        np.testing.assert_allclose(out.hidden[b], hidden, rtol=0, atol=2e-5)


def test_a_branch_sees_no_sibling_and_a_segment_no_other(toy, tokens, layout):
    """Changing token 4 (branch 1 of prompt 1, row 0) moves its own branch after it and nothing else."""
    changed = tokens.at[0, 4].set((tokens[0, 4] + 1) % toy.config.vocab)
    moved = np.abs(run(toy, tokens, **layout).hidden - run(toy, changed, **layout).hidden).max(axis=-1)
    assert (moved[0, [4, 5]] > 1e-3).all()
    assert (np.delete(moved[0], [4, 5]) == 0).all() and (moved[1] == 0).all()


def test_zero_b_is_the_base_model_bit_for_bit(toy, tokens):
    fresh = lora(toy.config, rank=2, alpha=4.0, key=jax.random.key(0))
    vector = steering_vector(toy.config)
    want = run(toy, tokens)
    for adapter in (fresh, vector):
        got = run(toy, tokens, adapter=adapter)
        np.testing.assert_array_equal(got.hidden, want.hidden)
        np.testing.assert_array_equal(got.taps, want.taps)


def test_zero_edits_are_the_base_model(toy, tokens):
    c = toy.config
    direction = jax.random.normal(jax.random.key(1), (c.layers, c.width))
    edits = add(direction, jnp.zeros(B), jnp.ones(c.layers), layers=range(c.layers))
    np.testing.assert_array_equal(run(toy, tokens, edits=edits).hidden, run(toy, tokens).hidden)
    masked = add(direction, jnp.ones(B), jnp.ones(c.layers), layers=[1])._replace(mask=jnp.zeros((B, T)))
    np.testing.assert_array_equal(run(toy, tokens, edits=masked).hidden, run(toy, tokens).hidden)


@pytest.mark.parametrize("kind", ["add", "clamp", "project_out"])
@pytest.mark.parametrize("layer", [0, 1])
def test_edits_do_what_their_formula_says(toy, tokens, kind, layer):
    """Only the edited layer's output is compared: what is before it is untouched, what is after follows from it."""
    c = toy.config
    direction = jax.random.normal(jax.random.key(2), (c.layers, c.width)) * 3
    norms = jnp.arange(1.0, c.layers + 1)
    doses = jnp.array([0.5, -2.0])
    edits = {
        "add": lambda: add(direction, doses, norms, layers=[layer]),
        "clamp": lambda: clamp(direction, doses, norms, layers=[layer]),
        "project_out": lambda: project_out(direction, rows=B, layers=[layer]),
    }[kind]()
    mask = (jnp.arange(T) % 3 > 0).astype(jnp.float32)[None] * jnp.ones((B, 1))
    before = np.asarray(run(toy, tokens).taps)
    after = np.asarray(run(toy, tokens, edits=edits._replace(mask=mask)).taps)
    unit = np.asarray(direction[layer] / jnp.linalg.norm(direction[layer]))
    on = np.asarray(mask) > 0
    np.testing.assert_array_equal(after[:layer], before[:layer])
    np.testing.assert_array_equal(after[layer][~on], before[layer][~on])
    goal = (np.asarray(doses) * float(norms[layer]))[:, None] * np.ones((B, T))
    want = {"add": before[layer] @ unit + goal, "clamp": goal, "project_out": np.zeros((B, T))}[kind]
    np.testing.assert_allclose((after[layer] @ unit)[on], want[on], rtol=0, atol=2e-5)
    across = lambda h: h - (h @ unit)[..., None] * unit  # noqa: E731
    np.testing.assert_allclose(across(after[layer]), across(before[layer]), rtol=0, atol=2e-5)
    assert np.abs(after[layer + 1 :] - before[layer + 1 :]).max() > 1e-3


def test_two_directions_at_once(toy, tokens):
    """h + mask sum_k [add_k + gain_k (target_k - h . v_k)] v_k with both coordinates read before either is changed."""
    c, keys = toy.config, jax.random.split(jax.random.key(3), 4)
    vector = jax.random.normal(keys[0], (c.layers, 2, c.width))
    vector = vector / jnp.linalg.norm(vector, axis=-1, keepdims=True)
    numbers = [jax.random.normal(k, (c.layers, B, 2)) for k in keys[1:]]
    only_last = jnp.zeros((c.layers, 1, 1)).at[-1].set(1.0)
    push, gain, target = (x * only_last for x in numbers)
    edits = Edits(vector, push, gain, target, jnp.ones((B, T)))
    h, v = np.asarray(run(toy, tokens).taps[-1], np.float64), np.asarray(vector[-1], np.float64)
    want = h.copy()
    for b in range(B):
        for k in range(2):
            along = h[b] @ v[k]
            want[b] += (push[-1, b, k] + gain[-1, b, k] * (target[-1, b, k] - along))[:, None] * v[k]
    np.testing.assert_allclose(run(toy, tokens, edits=edits).taps[-1], want, rtol=0, atol=2e-5)


def test_a_row_cannot_be_steered_at_a_layer_that_is_not_there(toy):
    direction = jnp.ones((toy.config.layers, toy.config.width))
    with pytest.raises(BadInput, match="layer 3 is out of range; the model has layers 0..2"):
        add(direction, jnp.ones(1), jnp.ones(toy.config.layers), layers=[3])


def test_taps(toy, tokens):
    """Any tree of values comes back stacked over layers, and the last residual under the final norm is the output."""
    c = toy.config
    out = run(toy, tokens)
    assert out.taps.shape == (c.layers, B, T, c.width)
    np.testing.assert_allclose(rms_norm(out.taps[-1], toy.params["norm"], c.norm_eps), out.hidden, rtol=0, atol=1e-6)
    two = _jitted(c, toy.params, tokens, tap=lambda h: (h[:, -1], {"mean": h.mean(axis=1)}))
    np.testing.assert_allclose(two.taps[0], out.taps[:, :, -1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(two.taps[1]["mean"], out.taps.mean(axis=2), rtol=0, atol=1e-6)
    assert _jitted(c, toy.params, tokens).taps is None


def test_every_remat_mode_has_the_same_gradient(toy, toy_adapter, tokens):
    weights = jax.random.normal(jax.random.key(4), (B, T, toy.config.width))

    def loss(params, adapter, remat):
        return jnp.sum(weights * forward(toy.config, params, tokens, adapter=adapter, remat=remat).hidden)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    want = gradient(toy.params, toy_adapter, "none")
    for mode in ("dots", "linear", "full"):
        got = gradient(toy.params, toy_adapter, mode)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    assert all(float(jnp.abs(x).max()) > 1e-3 for t in want[1].values() for n, x in t.items() if n != "scale")
    assert all(float(jnp.abs(t["scale"]).max()) == 0 for t in want[1].values())


@pytest.mark.parametrize("length", [64, 145, 700])
def test_blocked_attention_is_plain_attention(length):
    """One block, several and the most there are, the longer ones not a multiple; packed rows, grouped heads."""
    keys = jax.random.split(jax.random.key(5), 3)
    q = jax.random.normal(keys[0], (2, 4, length, 6))
    k, v = (jax.random.normal(key, (2, 2, length, 6)) for key in keys[1:])
    segments = jnp.stack([jnp.minimum(jnp.arange(length) // 40 + 1, 3), jnp.where(jnp.arange(length) < 50, 1, 0)])
    branches = jnp.stack([jnp.arange(length) // 13 % 3, jnp.zeros(length, int)])
    seen = visible(segments, branches, segments, branches)
    slow = np.zeros((2, length, length), bool)
    for b in range(2):
        s, r = np.asarray(segments[b]), np.asarray(branches[b])
        slow[b] = np.tril((s[:, None] == s[None]) & ((r[None] == 0) | (r[:, None] == r[None])))
    np.testing.assert_array_equal(seen, slow)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, jnp.repeat(k, 2, axis=1)) / jnp.sqrt(6.0)
    weights = jax.nn.softmax(jnp.where(slow[:, None], scores, -jnp.inf), axis=-1)
    want = jnp.einsum("bhts,bhsd->bhtd", weights, jnp.repeat(v, 2, axis=1))
    got = jax.jit(attention)(q, k, v, jnp.where(seen, 0.0, -1e30))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_a_vector_adapter_adds_its_vector(toy, tokens):
    """scale u on all tokens at the chosen layer: the same as steering by its norm along it."""
    c = toy.config
    adapter = steering_vector(c, layers=[1])
    u = jax.random.normal(jax.random.key(6), (c.layers, c.width))
    adapter = {"vector": {**adapter["vector"], "u": u}}
    before, after = run(toy, tokens), run(toy, tokens, adapter=adapter)
    np.testing.assert_array_equal(after.taps[0], before.taps[0])
    np.testing.assert_allclose(after.taps[1] - before.taps[1], jnp.broadcast_to(u[1], (B, T, c.width)), atol=1e-5)
    steered = run(toy, tokens, edits=add(u, jnp.ones(B), jnp.linalg.norm(u, axis=-1), layers=[1]))
    np.testing.assert_allclose(after.hidden, steered.hidden, rtol=0, atol=1e-5)


def test_merged_weights_are_the_adapter(toy, toy_adapter, tokens):
    merged = merge(toy.config, toy.params, toy_adapter)
    want = run(toy, tokens, adapter=toy_adapter)
    got = _jitted(toy.config, merged, tokens, tap=residual)
    np.testing.assert_allclose(got.taps, want.taps, rtol=0, atol=5e-5)
    np.testing.assert_allclose(got.hidden, want.hidden, rtol=0, atol=2e-5)
    assert np.abs(want.hidden - run(toy, tokens).hidden).max() > 0.1
    with pytest.raises(BadInput, match="cannot be merged"):
        merge(toy.config, toy.params, steering_vector(toy.config))


def test_an_adapter_leaves_the_layers_it_was_not_given_alone(toy, tokens):
    """Only layer 2 is adapted: residuals of layers 0 and 1 are the base model's."""
    adapter = lora(toy.config, rank=2, alpha=4.0, targets=["q", "down"], layers=[2], key=jax.random.key(7))
    adapter = {n: {**t, "b": jnp.ones_like(t["b"])} for n, t in adapter.items()}
    before, after = run(toy, tokens), run(toy, tokens, adapter=adapter)
    np.testing.assert_array_equal(after.taps[:2], before.taps[:2])
    assert np.abs(after.taps[2] - before.taps[2]).max() > 1e-2


@pytest.mark.parametrize("pieces", [(11,), (4, 7), (5, 1, 1, 4)])
def test_a_cache_changes_nothing(toy, toy_adapter, tokens, pieces):
    """Reading a text in pieces through the cache gives the hidden states of reading it whole."""
    want = run(toy, tokens, adapter=toy_adapter).hidden
    cache, got, at = empty_cache(toy.config, B, T + 3), [], 0
    for n in pieces:
        out = _jitted(toy.config, toy.params, tokens[:, at : at + n], adapter=toy_adapter, cache=cache)
        cache, at = out.cache, at + n
        got.append(out.hidden)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=0, atol=1e-5)
    assert int(cache.length) == T


def test_rotary_scaling_linear():
    """The linear rule divides every frequency: position 8 at factor 4 is position 2."""
    scaled = rotary_angles(jnp.array([[8]]), 6, 10000.0, ("linear", 4.0))
    plain = rotary_angles(jnp.array([[2]]), 6, 10000.0, None)
    for a, b in zip(scaled, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_logits_are_hidden_times_head(toy, tokens):
    hidden = run(toy, tokens).hidden
    want = np.asarray(hidden, np.float64) @ np.asarray(toy.params["head"], np.float64).T
    np.testing.assert_allclose(logits(toy.params, hidden), want, rtol=0, atol=1e-5)


def test_the_nnx_module_is_the_forward(toy, tokens):
    from flax import nnx

    model = Decoder(toy.config, rngs=nnx.Rngs(9))
    params = model.pure_params()
    np.testing.assert_array_equal(nnx.jit(model)(tokens).hidden, _jitted(toy.config, params, tokens).hidden)
    jax.tree.map(np.testing.assert_array_equal, params, random_params(toy.config, 9))
    assert jax.tree.structure(params) == jax.tree.structure(toy.params)


def test_bfloat16_compute_keeps_shapes_and_stays_near(toy, tokens):
    want = run(toy, tokens).hidden
    got = run(toy, tokens, compute_dtype=jnp.bfloat16).hidden
    assert got.dtype == jnp.bfloat16
    assert float(jnp.abs(got.astype(jnp.float32) - want).mean()) < 0.1


def test_narrow_products_are_rounded_once():
    """x W of bfloat16 is the float32 product of the rounded factors, rounded; so are both gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, ct = (jax.random.normal(k, s) for k, s in zip(keys, ((5, 7), (7, 3), (5, 3)), strict=True))
    rounded = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float32)  # noqa: E731
    y, back = jax.vjp(product, x.astype(jnp.bfloat16), w)
    dx, dw = back(ct.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    near = {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(np.float32(y), rounded(x) @ rounded(w), **near)
    np.testing.assert_allclose(np.float32(dx), rounded(ct) @ rounded(w).T, **near)
    np.testing.assert_allclose(dw, rounded(x).T @ rounded(ct), **near)
    frozen = jax.make_jaxpr(lambda x, ct: jax.vjp(lambda x: product(x, w), x)[1](ct))
    narrow = (x.astype(jnp.bfloat16), ct.astype(jnp.bfloat16))
    assert str(frozen(*narrow)).count("dot_general") == 2  # y and dx: frozen weights get no gradient
    plain = jax.make_jaxpr(product)(x, w)
    assert str(plain) == str(jax.make_jaxpr(lambda x, w: x @ w)(x, w))  # float32 is left as it is


def test_models_has_one_name(monkeypatch):
    """`import models` would load every class a second time."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    with pytest.raises(ImportError, match="imported as aif.models"):
        importlib.import_module("models")
