"""Directions: whose tokens are whose, means over responses, contrasts, controls and files."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import build, once
from aif.corpus import Candidate, Conversation, Message
from aif.directions import (
    Activations,
    as_adapter,
    load_direction,
    mean_difference,
    random_direction,
    response_means,
    save_direction,
)
from aif.directions.activations import owners
from aif.directions.use import edits_from, parse
from aif.errors import BadInput
from aif.models.decoder import forward
from aif.types import Direction

END = "<|im_end|>"


def conversation(name, turns, kind="messages"):
    """A row whose every assistant turn is trained; the last one is the candidate."""
    *before, (_, last) = turns
    return Conversation(
        id=name,
        prompt=tuple(Message(*turn) for turn in before),
        candidates=(Candidate(content=last, stance="", ratings={}, extra={}),),
        domain="",
        language="",
        split="",
        kind=kind,
        where=name,
        train_turns=kind != "text",
        extra={},
    )


@pytest.fixture(scope="module")
def mixed(rows, lm):
    """Answers in trees, a conversation of two answers, and plain text, packed into the same rows."""
    talk = conversation("talk", [("user", "Hi"), ("assistant", "Oh, hello."), ("user", "Why?"), ("assistant", "So.")])
    text = conversation("text", [("assistant", "Once upon a time.")], kind="text")
    chosen = [rows[0], talk, text, rows[1]]
    return chosen, build(chosen, lm.tokenizer, which="target", length=384, target="discernment")


def test_owners_are_exactly_the_trained_tokens(mixed, rows, lm):
    """Decoding the tokens of each slot gives the answers with their end token; a text's first token is not trained."""
    chosen, data = mixed
    wanted = {
        0: content(rows[0]) + END,
        1: f"Oh, hello.{END}So.{END}",
        2: "nce upon a time.",
        3: content(rows[1]) + END,
    }
    seen = set()
    for batch in once(data, rows=1):
        batch = jax.tree.map(jnp.asarray, batch)
        whose = np.asarray(owners(batch))
        R = batch.ids.shape[1]
        for b in range(len(batch.ids)):
            for slot in range(R):
                ids = np.asarray(batch.tokens[b])[whose[b] == slot].tolist()
                if batch.ids[b, slot] < 0:
                    assert ids == []
                else:
                    assert lm.tokenizer.decode(ids) == wanted[int(batch.ids[b, slot])]
                    seen.add(int(batch.ids[b, slot]))
            assert int((whose[b] < R).sum()) == int((batch.weights[b] > 0).sum())
    assert seen == {0, 1, 2, 3}


def content(row, stance="discernment"):
    return next(c.content for c in row.candidates if c.stance == stance)


def test_owners_in_trees_of_four_answers(rows, lm):
    """Slots follow the candidates, target first, across the prompts packed into a row."""
    data = build(rows[:4], lm.tokenizer, which="all", length=512, target="discernment")
    found = {}
    for batch in once(data, rows=1):
        batch = jax.tree.map(jnp.asarray, batch)
        every = np.asarray(owners(batch))
        assert not (every[np.asarray(batch.branches) == 0] < batch.ids.shape[1]).any()
        for row, slot in np.argwhere(np.asarray(batch.ids) >= 0):
            text = lm.tokenizer.decode(np.asarray(batch.tokens[row])[every[row] == slot].tolist())
            found[int(batch.ids[row, slot])] = text
    for response, (number, candidate) in enumerate(data.owners):
        assert found[response] == rows[number].candidates[candidate].content + END


def test_response_means_are_those_of_each_response_alone(base, adapter, mixed):
    """A plain forward per response, residuals averaged by hand at every layer; the norm is the mean over all tokens."""
    policy, data = base.replace(adapter=adapter), mixed[1]
    got = response_means(policy, data, rows=2)
    run = jax.jit(lambda p, t: forward(p.config, p.params, t, adapter=p.adapter, tap=lambda h: h).taps)
    lengths = []
    for number, example in enumerate(data.examples):
        n = len(example["tokens"])
        taps = np.asarray(run(policy, np.pad(example["tokens"], (0, 128 - n))[None]))[:, 0]
        inside = taps[:, example["index"] + 1]
        np.testing.assert_allclose(got.means[number], inside.mean(axis=1), rtol=0, atol=2e-5)
        lengths.append(np.linalg.norm(inside, axis=-1))
        assert got.tokens[number] == len(example["targets"])
    np.testing.assert_allclose(got.norms, np.concatenate(lengths, axis=1).mean(axis=1), rtol=1e-5)
    assert got.means.shape == (4, policy.config.layers, policy.config.width)


@pytest.fixture
def three():
    """Responses of 1, 3 and 2 tokens, one layer, two dimensions."""
    return Activations(np.array([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 2.0]]]), np.array([1, 3, 2]), np.array([5.0]))


def test_mean_difference_by_hand(three):
    """Positive are the first two: one vote each, (2, 2) - (0, 2); by tokens, (1 + 9, 12)/4 - (0, 2) = (2.5, 1)."""
    positive = np.array([True, True, False])
    by_response = mean_difference(three, positive)
    by_token = mean_difference(three, positive, pooling="token", provenance={"layer": 0})
    np.testing.assert_allclose(by_response.vector, [[2.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(by_token.vector, [[2.5, 1.0]], atol=1e-7)
    np.testing.assert_allclose(mean_difference(three, ~positive).vector, [[-2.0, 0.0]], atol=1e-7)
    assert by_token.kind == "contrast"
    assert by_token.provenance == {
        "method": "mean difference",
        "pooling": "token",
        "sign": "positive minus negative",
        "norm_unit": "raw",
        "norms": [5.0],
        "layer": 0,
    }


def test_mean_difference_refuses_what_means_nothing(three):
    for positive in (np.ones(3, bool), np.zeros(3, bool)):
        with pytest.raises(BadInput, match="one of the two classes has no response"):
            mean_difference(three, positive)
    broken = three._replace(means=three.means * np.nan)
    with pytest.raises(BadInput, match="not finite"):
        mean_difference(broken, np.array([True, False, True]))


def test_random_directions_keep_the_norm_of_every_layer():
    v = jax.random.normal(jax.random.key(0), (3, 400)) * jnp.array([[1.0], [5.0], [0.0]])
    one, two = (random_direction(Direction(v, "contrast"), jax.random.key(k)) for k in (1, 2))
    np.testing.assert_allclose(jnp.linalg.norm(one.vector, axis=1), jnp.linalg.norm(v, axis=1), rtol=1e-5)
    rows = np.stack([np.asarray(x)[:2].ravel() / np.linalg.norm(x) for x in (v, one.vector, two.vector)])
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), rtol=0, atol=0.15)
    assert (one.kind, one.provenance) == ("random", {"norms_of": "contrast"})


def test_a_direction_as_an_adapter(toy):
    """It is added at its layer and nowhere else."""
    v = jax.random.normal(jax.random.key(0), (toy.config.layers, toy.config.width))
    adapter = as_adapter(Direction(v, "contrast"), 1)
    tokens = jnp.arange(5)[None]
    run = jax.jit(lambda p: forward(p.config, p.params, tokens, adapter=p.adapter, tap=lambda h: h).taps)
    before, after = run(toy), run(toy.replace(adapter=adapter))
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(after[1] - before[1], jnp.broadcast_to(v[1], (1, 5, 16)), rtol=0, atol=1e-5)
    for layer in (-1, toy.config.layers):
        with pytest.raises(BadInput, match=f"layer {layer} is out of range; the model has layers 0..2"):
            as_adapter(Direction(v, "contrast"), layer)


# Files


@pytest.fixture
def saved(tmp_path, lm):
    v = jax.random.normal(jax.random.key(1), (lm.config.layers, lm.config.width))
    about = {"weights": lm.fingerprint, "layer": 1, "norms": [2.0, 3.0], "pooling": "response"}
    path = tmp_path / "deep" / "contrast.safetensors"
    direction = Direction(v, "contrast", about)
    save_direction(direction, path)
    return path, direction


def test_a_file_gives_back_what_was_saved(saved, lm):
    path, direction = saved
    found = load_direction(path, fingerprint=lm.fingerprint, shape=(lm.config.layers, lm.config.width))
    np.testing.assert_array_equal(found.vector, direction.vector)
    assert (found.kind, found.provenance) == (direction.kind, direction.provenance)
    assert json.loads(path.with_suffix(".json").read_text()) == {"kind": "contrast", **direction.provenance}


def test_a_file_of_another_model_is_refused(saved, lm, tmp_path):
    path, _ = saved
    with pytest.raises(
        BadInput, match=f"extracted from other weights .{lm.fingerprint}. than this model's .other., those of a model"
    ):
        load_direction(path, fingerprint="other")
    with pytest.raises(BadInput, match=r"shape \(2, 64\) for a model of \(3, 64\)"):
        load_direction(path, shape=(3, 64))
    for value, message in (("embedding", "acts on 'embedding'"), (None, "not finite")):
        odd = tmp_path / "odd.safetensors"
        v = jnp.full((2, 64), jnp.nan) if value is None else jnp.ones((2, 64))
        save_direction(Direction(v, "contrast", {"site": value} if value else {}), odd)
        with pytest.raises(BadInput, match=message):
            load_direction(odd)
    with pytest.raises(BadInput, match="no such file"):
        load_direction(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        load_direction(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    from aif.checkpoint import save_arrays

    path = tmp_path / "x.safetensors"
    save_arrays(path, {"q": {"a": np.ones(3)}}, {})
    with pytest.raises(BadInput, match="holds no direction"):
        load_direction(path)


def test_steering_from_the_command_line(saved, lm):
    """FILE:DOSE pushes by dose times the residual norm at the file's layer, FILE:DOSE@LAYER at another one."""
    path, direction = saved
    own = edits_from(lm, steer=f"{path}:-0.5", ablate=None)
    other = edits_from(lm, steer=f"{path}:2@0", ablate=None, rows=3)
    np.testing.assert_allclose(own.add[:, 0, 0], [0.0, -0.5 * 3.0])
    np.testing.assert_allclose(other.add[:, :, 0], [[4.0] * 3, [0.0] * 3])
    unit = direction.vector / jnp.linalg.norm(direction.vector, axis=1, keepdims=True)
    np.testing.assert_allclose(own.vector[:, 0], unit, rtol=1e-6)
    gone = edits_from(lm, steer=None, ablate=path)
    np.testing.assert_array_equal(gone.gain, 1.0)
    np.testing.assert_array_equal(gone.add, 0.0)
    assert edits_from(lm, steer=None, ablate=None) is None
    both = edits_from(lm, steer=[f"{path}:1@0,{path}:-2", f"{path}:3"], clamp=f"{path}:0.5", ablate=f"{path}@1", rows=2)
    assert both.vector.shape == (2, 5, 64) and both.add.shape == (2, 2, 5)
    np.testing.assert_allclose(both.add[:, 1], [[2.0, 0, 0, 0, 0], [0, -6.0, 9.0, 0, 0]])
    np.testing.assert_allclose(both.gain[:, 1], [[0, 0, 0, 0, 0], [0, 0, 0, 1.0, 1.0]])
    np.testing.assert_allclose(both.target[1, 1], [0, 0, 0, 1.5, 0])
    with pytest.raises(BadInput, match="layer 9 is out of range"):
        edits_from(lm, steer=f"{path}:1@9", ablate=None)


@pytest.mark.parametrize("spec", ["file", "file:", "file:x", "file:1@", "file:1@x", ":1"])
def test_a_dose_that_cannot_be_read(spec):
    with pytest.raises(BadInput, match="write FILE:DOSE or FILE:DOSE@LAYER"):
        parse(spec)


def test_a_direction_without_units_or_layer_is_refused(lm, tmp_path):
    v = jnp.ones((lm.config.layers, lm.config.width))
    path = tmp_path / "x.safetensors"
    save_direction(Direction(v, "contrast", {"layer": 0}), path)
    with pytest.raises(BadInput, match="records no residual norms"):
        edits_from(lm, steer=f"{path}:1", ablate=None)
    save_direction(Direction(v, "contrast", {"norms": [1.0, 1.0]}), path)
    with pytest.raises(BadInput, match="names no layer"):
        edits_from(lm, steer=f"{path}:1", ablate=None)


def test_a_short_answer_keeps_its_slot(base, rows, lm):
    """An empty answer is only an end token; its mean is that one residual."""
    short = replace(rows[0], candidates=(replace(rows[0].candidates[0], content=""),))
    data = build([short], lm.tokenizer, which="target", length=128, target="")
    assert response_means(base, data, rows=1).tokens.tolist() == [1]
