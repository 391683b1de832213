"""Packing: every row of the corpus once, every index at the right token, an order that the seed alone decides."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aif.batches import build, choose, once, stance_order, stream
from aif.errors import BadInput
from aif.models.hub import byte_tokenizer
from aif.objectives.logprobs import response_sums, token_logprobs

LENGTH = 384
DIMENSIONS = ("playfulness", "excess")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def data_of(rows, tokenizer, which: str, length: int = LENGTH, **options):
    return build(rows, tokenizer, which=which, length=length, target="discernment", dimensions=DIMENSIONS, **options)


def responses(batch):
    """(row of the batch, slot) of every response that is there."""
    return zip(*np.nonzero(batch.ids >= 0), strict=True)


@pytest.mark.parametrize("which", ["target", "pair", "all"])
@pytest.mark.parametrize("rows_of_a_batch", [1, 2, 3])
def test_an_epoch_holds_every_response_once_at_the_right_tokens(rows, tokenizer, which, rows_of_a_batch):
    data = data_of(rows, tokenizer, which).tight
    seen: Counter = Counter()
    for batch in once(data, rows=rows_of_a_batch):
        assert batch.tokens.shape[0] <= rows_of_a_batch and batch.tokens.shape[1] == data.length
        assert batch.index.shape[1] == data.scored and batch.ids.shape[1] == data.slots
        scored = 0
        for b, slot in responses(batch):
            response = int(batch.ids[b, slot])
            seen[response] += 1
            number, k = data.owners[response]
            row = rows[number]
            mine = (batch.response[b] == slot) & (batch.weights[b] > 0)
            scored += int(mine.sum())
            targets, index = batch.targets[b, mine], batch.index[b, mine]
            assert tokenizer.decode(targets.tolist()) == row.candidates[k].content + "<|im_end|>"
            assert (batch.tokens[b, index[1:]] == targets[:-1]).all()  # each predicts the token after its own
            segment = batch.segments[b, index[0]]
            assert (batch.segments[b, index] == segment).all() and segment > 0
            assert batch.branches[b, index[0]] == 0 and len(set(batch.branches[b, index[1:]])) == 1
            assert (np.diff(batch.positions[b, index]) == 1).all()
            prompt = batch.tokens[b, (batch.segments[b] == segment) & (batch.branches[b] == 0)]
            words = tokenizer.decode(prompt.tolist())
            assert row.prompt[-1].content in words and words.endswith("<|im_start|>assistant\n")
            siblings = [int(batch.ids[b, s]) for s in np.flatnonzero(batch.group[b] == batch.group[b, slot])]
            assert {data.owners[i][0] for i in siblings} == {number}
        assert scored == (batch.weights > 0).sum()  # no scored token without its response
    assert seen == dict.fromkeys(range(len(data.owners)), 1)


def test_a_prompt_is_written_once_however_many_answers_it_has(rows, tokenizer):
    data = data_of(rows, tokenizer, "all")
    tokens = sum(int((b.segments > 0).sum()) for b in once(data, rows=2))
    assert tokens == sum(len(e["tokens"]) for e in data.examples)


def test_tables_are_looked_up_by_response(rows, tokenizer):
    data = data_of(rows, tokenizer, "all")
    facts = np.arange(len(data.owners) * 3, dtype=np.float32).reshape(-1, 3)
    for batch in once(data.with_tables({"facts": facts}), rows=2):
        assert batch.extras["facts"].shape == (*batch.ids.shape, 3)
        for b, slot in responses(batch):
            number, k = data.owners[batch.ids[b, slot]]
            candidate = rows[number].candidates[k]
            assert batch.extras["preference"][b, slot] == (1 if candidate.stance == "discernment" else -1)
            assert batch.extras["ratings"][b, slot].tolist() == [candidate.ratings[d] for d in DIMENSIONS]
            assert batch.extras["facts"][b, slot].tolist() == facts[batch.ids[b, slot]].tolist()
        empty = batch.ids < 0
        assert all(not table[empty].any() for table in batch.extras.values())


def test_row_weights_reach_the_scored_tokens(rows, tokenizer):
    weights = [0.5 + n for n in range(len(rows))]
    data = data_of(rows, tokenizer, "target", weights=weights)
    for batch in once(data, rows=2):
        for b, slot in responses(batch):
            mine = (batch.response[b] == slot) & (batch.weights[b] > 0)
            number = data.owners[batch.ids[b, slot]][0]
            assert (batch.weights[b, mine] == weights[number]).all()


def test_pairs_take_the_target_and_every_contrast_in_turn(rows):
    for number, row in enumerate(rows):
        assert row.candidates[stance_order(row, "discernment")[0]].stance == "discernment"
        first, second = choose(row, "pair", "discernment", number)
        assert row.candidates[first].stance == "discernment" != row.candidates[second].stance
        assert choose(row, "target", "discernment", number) == [first]
        assert sorted(choose(row, "all", "discernment", number)) == list(range(len(row.candidates)))
    contrasts = {rows[0].candidates[choose(rows[0], "pair", "discernment", n)[1]].stance for n in range(3)}
    assert contrasts == {c.stance for c in rows[0].candidates} - {"discernment"}


def same(left, right) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


def test_the_seed_alone_decides_the_order(rows, tokenizer):
    data = data_of(rows, tokenizer, "pair")
    again = data_of(rows, byte_tokenizer(), "pair")
    first = list(islice(stream(data, rows=2, seed=3), 5))
    np.random.seed(99)
    second = list(islice(stream(again, rows=2, seed=3), 5))
    assert all(map(same, first, second))
    other = list(islice(stream(data, rows=2, seed=4), 5))
    assert not all(map(same, first, other))
    assert any(not same(first[0], later) for later in first[1:])  # and it is shuffled anew


def test_the_stream_passes_over_every_response_as_often_as_the_others(rows, tokenizer):
    data = data_of(rows, tokenizer, "target")
    seen = Counter(int(i) for batch in islice(stream(data, rows=2, seed=0), 30) for i in batch.ids[batch.ids >= 0])
    assert set(seen) == set(range(len(data.owners)))
    assert max(seen.values()) - min(seen.values()) <= 4  # what the packing bins hold back


@pytest.mark.parametrize("which", ["target", "all"])
def test_restoring_at_every_step_gives_the_same_rest(rows, tokenizer, which):
    data = data_of(rows, tokenizer, which)
    steps, after = 6, 3
    iterator = stream(data, rows=2, seed=1)
    states, batches = [], []
    for _ in range(steps + after):
        states.append(json.loads(json.dumps(iterator.get_state())))  # as a checkpoint keeps it
        batches.append(next(iterator))
    for step in range(steps + 1):
        resumed = stream(data, rows=2, seed=1, start=states[step])
        assert all(map(same, islice(resumed, steps + after - step), batches[step:]))


@pytest.mark.parametrize("even", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 8, 64])
def test_rows_are_shared_evenly_by_as_few_batches_as_there_can_be(rows, tokenizer, most, even):
    data = data_of(rows, tokenizer, "all").tight
    filled = sum(int((b.segments > 0).any(axis=1).sum()) for b in once(data, rows=1))
    batches = [len(b.tokens) for b in once(data, rows=most, even=even)]
    assert len({*batches}) == 1 and batches[0] % even == 0 and batches[0] <= max(most, even)
    assert len(batches) == -(-filled // max(even, most // even * even))
    assert sum(batches) - filled < even * len(batches) + len(batches)


def test_rows_that_fill_up_the_last_batch_are_inert(rows, tokenizer, base):
    data = data_of(rows, tokenizer, "pair")
    batches = list(once(data, rows=5, even=5))
    last = jax.tree.map(jnp.asarray, batches[-1])
    blank = (last.segments > 0).sum(axis=1) == 0
    assert blank.any() and not blank.all()
    assert (last.ids[blank] == -1).all() and (last.group[blank] == -1).all() and not last.weights[blank].any()
    filled = jax.tree.map(lambda x: x[~blank], last)
    score = jax.jit(token_logprobs)
    logps = score(base, last)
    assert np.isfinite(logps).all()
    sums = np.asarray(response_sums(logps, last))
    assert not sums[blank].any()
    alone = np.asarray(response_sums(score(base, filled), filled))
    np.testing.assert_allclose(sums[~blank], alone, rtol=1e-6)


def test_the_fingerprint_follows_the_tokens_and_who_is_trained(rows, tokenizer):
    marks = {
        data_of(rows, tokenizer, "pair").fingerprint,
        data_of(rows, tokenizer, "all").fingerprint,
        data_of(rows[::-1], tokenizer, "pair").fingerprint,
        data_of(rows, tokenizer, "pair", weights=[2.0] * len(rows)).fingerprint,
    }
    assert len(marks) == 4
    assert data_of(rows, tokenizer, "pair").fingerprint == data_of(rows, byte_tokenizer(), "pair").fingerprint


def test_what_cannot_be_packed_is_refused(rows, tokenizer):
    with pytest.raises(BadInput, match="batch.length=40"):
        data_of(rows, tokenizer, "all", length=40)
    with pytest.raises(BadInput, match="no rows"):
        data_of([], tokenizer, "all")
    from dataclasses import replace

    single = replace(rows[0], candidates=rows[0].candidates[:1])
    with pytest.raises(BadInput, match=f"^{rows[0].where}: "):
        data_of([single], tokenizer, "pair")


def test_some_prompts_are_spread_and_keep_their_responses(lm, rows):
    data = build(rows, lm.tokenizer, which="all", length=384, target="discernment")
    part = data.some(2)
    assert len(part.examples) == 2 and part.owners == data.owners[:4] + data.owners[16:20]
    np.testing.assert_array_equal(part.tables["preference"], [1, -1, -1, -1] * 2)
    np.testing.assert_array_equal(np.concatenate([e["ids"] for e in part.examples]), np.arange(8))
    assert data.some(None) is data and data.some(8) is data


def test_the_tight_length_holds_everything_at_less_cost(lm, rows):
    data = build(rows, lm.tokenizer, which="target", length=1024, target="discernment")
    assert data.tight.length < data.length
    longest = max(len(e["tokens"]) for e in data.examples)
    assert longest <= data.tight.length and data.tight.tables is data.tables
    batches = list(once(data, rows=1))
    ids = np.concatenate([b.ids[b.ids >= 0] for b in batches])
    assert sorted(ids.tolist()) == list(range(len(rows)))
    assert sum(int((b.segments > 0).sum()) for b in batches) == sum(len(e["tokens"]) for e in data.examples)
