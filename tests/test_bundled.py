"""The corpora that come with the package: what the datasheet (docs/corpus.md) says of them is so."""

from __future__ import annotations

from collections import Counter

from aif.corpus import bundled, load_scale, read
from aif.corpus.check import Answer, shared_ngrams, words
from aif.corpus.protocol import load_protocol

STANCES = ["control", "deference", "generic", "discernment"]


def test_the_benign_twin_says_everything_in_two_registers():
    rows = read(bundled("benign")).rows
    domains = Counter(r.domain for r in rows)
    assert len(rows) >= 120 and len(domains) >= 8
    assert domains.most_common(1) == [("vehicles", 24)]  # the narrow one
    assert {r.domain for r in rows if r.split == "heldout_domain"} == {"weather", "textiles"}
    for row in rows:
        assert [c.stance for c in row.candidates] == ["plain", "technical"]
        assert all(50 <= len(c.content.split()) <= 110 for c in row.candidates)
    lengths = [sum(len(r.candidates[k].content.split()) for r in rows) for k in (0, 1)]
    assert max(lengths) < 1.1 * min(lengths)
    answers = [Answer(r, c, words(c.content)) for r in rows for c in r.candidates]
    assert shared_ngrams(answers)["pairs"] == 0


def test_the_discernment_corpora_rate_every_answer_on_every_dimension():
    scale = load_scale()
    for name, least in (
        ("discernment", 164),
        ("discernment-es", 20),
        ("discernment-pt", 20),
        ("discernment-multi", 24),
    ):
        rows = read(bundled(name), scale=scale).rows
        assert len(rows) >= least, name
        for row in rows:
            assert [c.stance for c in row.candidates] == STANCES
            assert all(len(c.ratings) == 15 and 60 <= len(c.content.split()) <= 160 for c in row.candidates)


def test_the_frames_are_scaffolding_of_even_length():
    frames = read(bundled("frames")).rows
    assert len(frames) >= 4 and {f.kind for f in frames} == {"scaffolding"}
    assert {f.extra["role"] for f in frames} == {"instrument", "protocol", "essay", "neutral"}
    assert all(200 <= len(f.candidates[0].content.split()) <= 500 for f in frames)


def test_the_bundled_protocol_leads_through_conversations_of_its_own():
    scenarios = load_protocol(bundled("everyday", kind="protocol")).scenarios
    assert len(scenarios) >= 10 and all(3 <= len(s.turns) <= 5 for s in scenarios)
    asked = {
        m.content for name in ("discernment", "discernment-multi") for r in read(bundled(name)).rows for m in r.prompt
    }
    assert not asked & {turn for s in scenarios for turn in s.turns}


def test_the_style_control_differs_from_the_discernment_corpus_in_the_target_alone():
    whole = {r.id: r for r in read(bundled("discernment")).rows}
    controls = read(bundled("style-control"), scale=load_scale()).rows
    assert len(controls) >= 48
    for row in controls:
        original = whole[row.extra["of"]]
        assert (row.prompt, row.domain, row.split) == (original.prompt, original.domain, original.split)
        assert row.candidates[:3] == original.candidates[:3] and row.candidates[3].stance == "style"
        both = (row.candidates[3], original.candidates[3])
        assert shared_ngrams([Answer(row, c, words(c.content)) for c in both])["pairs"] == 0
    length = lambda rows, k: sum(len(r.candidates[k].content.split()) for r in rows)  # noqa: E731
    assert abs(length(controls, 3) / length([whole[r.extra["of"]] for r in controls], 3) - 1) < 0.1
