"""Field preferences: the framed reference's log-probabilities, and the objectives made from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif import testing
from aif.corpus import Message, find_frame
from aif.errors import BadInput
from aif.objectives import Context, efe, grpo
from aif.objectives.field import FieldPreference, answer_logprobs, framed_prompt, utilities
from aif.policy import bind
from aif.readers import Answer
from aif.tokens import encode_answer, encode_prompt

FRAME = "Speak plainly."


@pytest.fixture(scope="module")
def context(lm):
    from aif.corpus import bundled, load_scale, read

    scale = load_scale()
    dimensions = tuple(d.id for d in scale.dimensions)
    candidates = [c for row in read(bundled("tiny")).rows for c in row.candidates]
    table = np.array([[c.ratings.get(d, -1) for d in dimensions] for c in candidates])
    return Context(
        dimensions, tuple(scale.levels), table, table, reference=bind(lm), tokenizer=lm.tokenizer, frame=lambda _: FRAME
    )


@pytest.fixture(scope="module")
def answers(rows):
    return [Answer(row.prompt, candidate.content) for row in rows[:2] for candidate in row.candidates]


def by_hand(lm, prompt, ids):
    """ln p of the answer's tokens from the logits of the whole text, one row, no cache."""
    asked = encode_prompt(lm.tokenizer, prompt)
    text = jnp.array([[*asked, *ids]])
    logps = jax.nn.log_softmax(lm.logits(text)[0], axis=-1)
    return sum(float(logps[len(asked) + n - 1, token]) for n, token in enumerate(ids))


def test_the_framed_reference_scores_as_the_whole_text_does(lm, answers):
    found = answer_logprobs(bind(lm), lm.tokenizer, answers[:2], FRAME)
    for value, answer in zip(found, answers, strict=False):
        prompt = (Message("system", FRAME), *answer.prompt)
        ids = encode_answer(lm.tokenizer, prompt, answer.content, "here")
        np.testing.assert_allclose(value, by_hand(lm, prompt, ids), rtol=1e-5)


def test_sampled_tokens_are_scored_as_they_are(lm, answers):
    """A sample that was cut off has no end of turn, and none is added."""
    ids = encode_answer(lm.tokenizer, answers[0].prompt, answers[0].content, "here")[:5]
    found = answer_logprobs(bind(lm), lm.tokenizer, [answers[0]._replace(ids=ids)], "")
    np.testing.assert_allclose(found, by_hand(lm, answers[0].prompt, ids), rtol=1e-5)


def test_answers_to_one_prompt_are_scored_as_apart(lm, answers):
    together = answer_logprobs(bind(lm), lm.tokenizer, answers, FRAME)
    apart = [answer_logprobs(bind(lm), lm.tokenizer, [a], FRAME)[0] for a in answers[3:5]]
    np.testing.assert_allclose(together[3:5], apart, rtol=1e-5)


def test_relative_utility_is_the_gain_over_no_frame(lm, answers, context):
    absolute = utilities(answers[:3], context=context, frame=FRAME, relative=False)
    relative = utilities(answers[:3], context=context, frame=FRAME, relative=True)
    plain = answer_logprobs(bind(lm), lm.tokenizer, answers[:3], "")
    np.testing.assert_allclose(relative, absolute - plain, atol=1e-4)
    assert np.abs(relative).max() > 0.01


def test_an_own_system_message_comes_after_the_frame():
    prompt = (Message("system", "Be brief."), Message("user", "Hello"))
    assert framed_prompt(prompt, FRAME) == (Message("system", f"{FRAME}\n\nBe brief."), Message("user", "Hello"))
    assert framed_prompt(prompt, "") == prompt


@pytest.mark.parametrize("online", [None, {"samples": 2, "new_tokens": 4}])
def test_objectives_with_a_field_keep_the_contract(lm, context, online):
    options = efe.Options(preferences=FieldPreference(frame="any", relative=True))
    evaluation = efe.evaluation_of(options.reader, options.preferences, 1.0, context)
    if online is None:
        testing.check(efe.make(options, context), lm)
    else:  # ratings know no samples: the reader sees none of them, and the field is all there is
        evaluation = efe.Evaluation(
            jax.tree_util.Partial(lambda taps, batch: {**_nothing(batch), "pragmatic": batch.extras["field"]}),
            None,
            evaluation.annotate,
        )
        testing.check(grpo.grpo(evaluation, options=grpo.Options(**online)), lm)


def _nothing(batch):
    zero = jnp.zeros(batch.ids.shape)
    return {"pragmatic": zero, "state_gain": zero, "parameter_gain": zero}


def test_frames_are_found_by_name_or_file(tmp_path):
    assert "Before answering" in find_frame("attending")
    file = tmp_path / "mine.txt"
    file.write_text("Mine.\n")
    assert find_frame(str(file)) == "Mine."
    file.write_text(" \n")
    with pytest.raises(BadInput, match="is empty; write"):
        find_frame(str(file))
    with pytest.raises(BadInput, match="did you mean 'attending'"):
        find_frame("atending")
    with pytest.raises(BadInput, match="none.txt"):
        find_frame(str(tmp_path / "none.txt"))


def test_a_frame_that_does_not_fit_is_refused(lm, answers):
    with pytest.raises(BadInput, match="preferences.frame: .* shorten the text"):
        answer_logprobs(bind(lm), lm.tokenizer, answers[:1], "word " * 2000)
