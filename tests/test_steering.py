"""Edits beside one another, on given answers, and during training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif
from aif.batches import one_per_row, stream
from aif.checkpoint import save_arrays
from aif.config import check
from aif.corpus import Message
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.log import Progress
from aif.models.decoder import forward, logits
from aif.objectives.sft import sft
from aif.sampling import generate
from aif.slots import asking
from aif.steering import add, beside_plain, clamp, project_out, together, within
from aif.tokens import encode_prompt, tree


@pytest.fixture(scope="module")
def push(lm):
    """A push at layer 0 with one row for all."""
    c = lm.config
    direction = jax.random.normal(jax.random.key(0), (c.layers, c.width))
    return add(direction, jnp.array([3.0]), jnp.ones(c.layers), layers=[0])


def test_several_edits_are_the_sum_of_what_each_changes(toy):
    """A push, a clamp and an ablation at one layer, rows of one and of two: h + the three changes made by hand."""
    c = toy.config
    u, v, w = (jax.random.normal(jax.random.key(k), (c.layers, c.width)) for k in range(3))
    norms, layers = jnp.arange(1.0, c.layers + 1), [c.layers - 1]
    parts = [
        add(u, jnp.array([0.5, -1.0]), norms, layers=layers),
        clamp(v, jnp.array([2.0]), norms, layers=layers),
        project_out(w, rows=1, layers=layers),
    ]
    tokens = jnp.arange(10).reshape(2, 5)
    run = jax.jit(lambda p, e: forward(p.config, p.params, tokens, edits=e, tap=lambda h: h).taps[-1])
    h = np.asarray(run(toy, None))
    unit = [np.asarray(x[-1] / jnp.linalg.norm(x[-1])) for x in (u, v, w)]
    want = h + (np.array([0.5, -1.0]) * norms[-1])[:, None, None] * unit[0]
    want = want + (2.0 * norms[-1] - h @ unit[1])[..., None] * unit[1] - (h @ unit[2])[..., None] * unit[2]
    np.testing.assert_allclose(run(toy, together(*parts)), want, rtol=0, atol=2e-5)


def test_beside_plain_leaves_the_first_row_alone(lm, base, push):
    prompts = [[5, 6, 7, 8]] * 2
    made = generate(base.replace(edits=beside_plain(push)), prompts, new_tokens=6, stop=9999)
    for row, policy in enumerate((base, base.replace(edits=push))):
        alone = generate(policy, prompts[:1], new_tokens=6, stop=9999)
        np.testing.assert_array_equal(made.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(made.logps[row], alone.logps[0], rtol=0, atol=2e-5)
    assert np.abs(np.asarray(made.logps[0] - made.logps[1])).max() > 1e-3


def test_scopes_of_a_packed_row_by_hand(push):
    """A prompt of three tokens with answers of two and one, and two tokens of padding."""
    batch = jax.tree.map(jnp.asarray, one_per_row([tree([1, 2, 3], [[4, 5], [6]])], 8, 4, 2))
    np.testing.assert_array_equal(asking(batch)[0], [0, 0, 1, 0, 0, 0, 0, 0])
    for scope, want in (
        ("all", [1, 1, 1, 1, 1, 1, 0, 0]),
        ("prompt", [1, 1, 1, 0, 0, 0, 0, 0]),
        ("response", [0, 0, 0, 1, 1, 1, 0, 0]),
        ("last", [0, 0, 1, 1, 1, 1, 0, 0]),
        ([0, slice(4, None)], [1, 0, 0, 0, 1, 0, 0, 0]),  # positions run on from the prompt in every answer
        ([3], [0, 0, 0, 1, 0, 1, 0, 0]),
    ):
        np.testing.assert_array_equal(within(push, batch, scope).mask[0], want, err_msg=str(scope))


def test_given_answers_are_scored_under_edits(lm, push):
    """A plain forward of prompt and answer, log-probabilities summed by hand; and only steered tokens move it."""
    answers = ["Yes.", "No, never."]
    found = {scope: aif.score(lm, "Well?", answers, edits=push, scope=scope) for scope in ("all", "response")}
    prompt = encode_prompt(lm.tokenizer, [Message("user", "Well?")])
    for row, text in enumerate(answers):
        ids = [*lm.tokenizer.encode(text, add_special_tokens=False), lm.tokenizer.eos_token_id]
        whole = jnp.array([[*prompt, *ids]])
        for scope, first in (("all", 0), ("response", len(prompt))):
            mask = (jnp.arange(whole.shape[1]) >= first)[None].astype(jnp.float32)
            hidden = forward(lm.config, lm.params, whole, edits=push._replace(mask=mask)).hidden
            log_p = jax.nn.log_softmax(logits(lm.params, hidden))[0]
            want = sum(float(log_p[len(prompt) - 1 + t, i]) for t, i in enumerate(ids))
            np.testing.assert_allclose(found[scope][row], want, rtol=1e-4)
    assert aif.score(lm, "Well?", answers) != found["all"]
    with pytest.raises(BadInput, match="no answer to score"):
        aif.score(lm, "Well?", [])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = aif.load("tiny-random")
    about = {"kind": "contrast", "weights": model.fingerprint, "layer": 1, "norms": [1.0, 2.0]}
    path = tmp_path_factory.mktemp("steer") / "d.safetensors"
    save_arrays(path, {"direction": np.ones((2, 64), np.float32)}, about)
    return path


def experiment(**stage):
    arm = {"objective": {"name": "sft"}, "steps": 2, **stage}
    return Experiment(
        check(
            {
                "model": {"source": "tiny-random", "remat": "none"},
                "corpus": {"path": "bundled:tiny"},
                "batch": {"rows": 2, "length": 384},
                "adapter": {"rank": 2},
                "arms": {"sft": arm},
            }
        )
    )


def train(e):
    arm = e.config.arms["sft"]
    return e.train(arm, e.fresh(0), seed=0, name="sft", folder=None, progress=Progress(quiet=True))


def test_training_under_a_push(file):
    """The loss of the first step is that of the steered model; the edits are no part of what is found; a dose of zero
    trains what no dose trains; and which tokens are pushed decides."""
    plain, pushed = experiment(), experiment(steer=f"{file}:2@0", steer_scope="response")
    batch = next(stream(pushed.data("target", "train", ""), rows=2, seed=0))
    policy = pushed.steered(pushed.config.arms["sft"])
    want = sft().loss(policy, jax.tree.map(jnp.asarray, batch)).total.value
    made = {"none": train(plain), "zero": train(experiment(steer=f"{file}:0")), "response": train(pushed)}
    made["all"] = train(experiment(steer=f"{file}:2@0"))
    np.testing.assert_allclose(made["response"].lines[0]["loss"], want, rtol=1e-4)
    assert jax.tree.structure(made["response"].trainable) == jax.tree.structure(made["none"].trainable)
    for x, y in zip(jax.tree.leaves(made["none"].trainable), jax.tree.leaves(made["zero"].trainable), strict=True):
        np.testing.assert_array_equal(x, y)
    losses = {name: stage.lines[0]["loss"] for name, stage in made.items()}
    assert len(set(losses.values())) == 3 and losses["none"] == losses["zero"]


@pytest.mark.parametrize(
    "stage,line",
    [
        ({"steer": "{}:1@7"}, "arms.sft.steer: steer: layer 7 is out of range; the model has layers 0..1"),
        ({"steer": "{}:much"}, "arms.sft.steer: .*write FILE:DOSE"),
        ({"steer": "nowhere.safetensors:1"}, "arms.sft.steer: nowhere.safetensors: no such file"),
        ({"steer": "{}:1", "steer_scope": "answers"}, "arms.sft.steer: scope: 'answers' is none"),
    ],
)
def test_a_push_that_cannot_be_is_found_before_training(stage, line, file):
    with pytest.raises(BadInput, match=line):
        experiment(**{k: v.format(file) for k, v in stage.items()}).check("sft")
