"""What is done to a corpus: agreement of raters, splitting, other formats and back, parquet, and the verbs for it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from aif.corpus import Candidate, bundled, load_scale, read
from aif.corpus.agreement import agreement
from aif.corpus.splits import split
from aif.corpus.writing import FORMATS, convert, own, write
from aif.errors import BadInput


@pytest.fixture
def call(call):
    """`aif corpus ...` in this process: its exit status and what it wrote to stdout and stderr."""
    return partial(call, "corpus")


def written(path, rows, **options):
    write(path, rows)
    return read(path, scale=load_scale(), **options)


def without(rows, *names):
    return [replace(r, where="", **dict.fromkeys(names, "")) for r in rows]


# other formats and back


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ["tiny", "discernment-multi"])
def test_our_own_format_comes_back_as_it_was(tmp_path, name, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    before = read(bundled(name), scale=load_scale())
    after = written(tmp_path / f"c.{ending}", [own(r) for r in before.rows])
    assert without(after.rows) == without(before.rows)
    assert after.rows[1].where == f"{tmp_path}/c.{ending}:2" and len(after.sha256) == 64


def test_rows_of_every_kind_come_back_as_they_were(tmp_path):
    mixed = [
        {"id": "a", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"id": "b", "text": "Once.", "ratings": {"excess": 1}, "markers": ["warm"], "mine": {"k": [1]}},
        {"id": "c", "text": "A frame.", "kind": "scaffolding"},
        {"id": "d", "prompt": "x", "completion": "y", "nexus_excess": 2, "domain": "tea"},
        {"id": "e", "prompt": "x", "chosen": "y", "rejected": "z", "split": "heldout"},
    ]
    before = written(tmp_path / "a.jsonl", mixed)
    after = written(tmp_path / "b.jsonl", [own(r) for r in before.rows])
    assert without(after.rows) == without(before.rows)


@pytest.mark.parametrize("to", [f for f in FORMATS if f != "text"])
def test_every_format_is_read_again_with_the_target_answer_and_its_ratings(tmp_path, rows, to):
    made = written(tmp_path / "c.jsonl", convert(rows, to, "discernment")).rows
    answers = {(r.prompt, c.content): c.ratings for r in made for c in r.candidates}
    for row in rows:
        best = row.candidates[3]
        assert best.stance == "discernment" and (row.prompt, best.content) in answers
        if to != "pair":
            assert answers[row.prompt, best.content] == best.ratings
    assert Counter(len(r.candidates) for r in made) == {"candidates": {4: 8}, "pair": {2: 24}, "columns": {1: 32}}.get(
        to, {1: 8}
    )


def test_what_the_formats_look_like(rows):
    first = rows[:1]
    said = rows[0].candidates[3].content
    asked = rows[0].prompt[0].content
    (row,) = convert(first, "sharegpt", "discernment")
    assert row["conversations"] == [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    (row,) = convert(first, "completion", "discernment")
    assert (row["prompt"], row["completion"], row["ratings"]["excess"]) == (asked, said, 2)
    row = convert(first, "columns", "discernment")[3]
    assert (row["id"], row["response"], row["excess"], row["stance"]) == ("tea-01/discernment", said, 2, "discernment")
    assert "ratings" not in row
    row = convert(first, "pair", "discernment")[0]
    assert (row["id"], row["chosen"], row["rejected"]) == ("tea-01/control", said, rows[0].candidates[0].content)
    assert convert(first, "text", "discernment")[0]["text"] == said


def test_helpsteer_columns_are_read_with_a_scale_of_that_kind(tmp_path):
    """prompt, response and five whole-number columns from 0 to 4, as in the HelpSteer2 data set."""
    scale = load_scale("helpsteer")
    names = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    assert [d.id for d in scale.dimensions] == names and len(scale.levels) == 5
    row = {"prompt": "c#", "response": "A language.", **dict(zip(names, (3, 3, 4, 2, 0), strict=True))}
    write(tmp_path / "h.jsonl", [row])
    (found,) = read(tmp_path / "h.jsonl", scale=scale).rows
    assert found.candidates[0].ratings == dict(zip(names, (3, 3, 4, 2, 0), strict=True)) and found.extra == {}
    write(tmp_path / "h.jsonl", [{**row, "verbosity": 5}])
    with pytest.raises(BadInput, match="h.jsonl:1: verbosity: 5 is outside the scale; use 0..4"):
        read(tmp_path / "h.jsonl", scale=scale)
    write(tmp_path / "h.jsonl", [{**row, "response": " "}])
    with pytest.raises(BadInput, match="h.jsonl:1: response: the answer is empty"):
        read(tmp_path / "h.jsonl", scale=scale)


def test_formats_that_do_not_fit(tmp_path, rows):
    text = written(tmp_path / "t.jsonl", [{"id": "t", "text": "Once."}]).rows
    for to in ("messages", "sharegpt", "completion", "columns"):
        with pytest.raises(BadInput, match=r"t.jsonl:1: prompt: .* \(id 't'\)"):
            convert(text, to, "discernment")
    asked = written(tmp_path / "p.jsonl", [{"id": "p", "prompt": "Why?"}]).rows
    for to in ("messages", "columns", "pair"):
        with pytest.raises(BadInput, match=r"p.jsonl:1: prompt: has no answer; .* \(id 'p'\)"):
            convert(asked, to, "discernment")
    assert convert(asked, "candidates", "")[0]["prompt"] == [{"role": "user", "content": "Why?"}]
    with pytest.raises(BadInput, match="one answer makes no pair"):
        convert([replace(rows[0], candidates=(Candidate("a"),))], "pair", "discernment")
    with pytest.raises(BadInput, match="no format is called 'sharegtp', did you mean 'sharegpt'"):
        convert(rows, "sharegtp", "discernment")
    with pytest.raises(BadInput, match="cannot be written"):
        write(tmp_path / "no" / "c.jsonl", [])


def test_parquet_rows_are_checked_like_lines(tmp_path):
    pytest.importorskip("pyarrow")
    bad = [
        {"id": "a", "prompt": "x", "completion": "y", "n": 1.0},
        {"id": "b", "prompt": "x", "completion": "y", "n": float("nan")},
    ]
    write(tmp_path / "c.parquet", bad)
    with pytest.raises(BadInput, match=r"c.parquet:2: n: nan is no finite number; .* \(id 'b'\)"):
        read(tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(BadInput, match="no readable parquet file"):
        read(tmp_path / "d.parquet")


# splitting


def test_a_split_is_by_prompt_and_by_domain(rows):
    many = [
        replace(rows[0], id=f"{d}-{k}-{copy}", domain=d, prompt=(replace(rows[0].prompt[0], content=f"{d} {k}"),))
        for d in ("tea", "rain", "music")
        for k in range(10)
        for copy in range(2)
    ]
    frame = replace(rows[0], id="frame", kind="scaffolding", domain="tea", split="")
    found = split([*many, frame], share=0.2, domains=["music"], seed=1)
    assert Counter(r.split for r in found) == {"train": 32, "heldout": 8, "heldout_domain": 20, "": 1}
    assert {r.domain for r in found if r.split == "heldout_domain"} == {"music"}
    together = {}
    for r in found:
        together.setdefault((r.kind, r.prompt), set()).add(r.split)
    assert all(len(splits) == 1 for splits in together.values())
    assert (
        found
        == split([*many, frame], share=0.2, domains=["music"], seed=1)
        != split([*many, frame], share=0.2, domains=["music"], seed=2)
    )
    assert [replace(r, split="") for r in found] == [replace(r, split="") for r in [*many, frame]]


def test_a_domain_of_one_prompt_trains_and_nonsense_is_refused(rows):
    assert [r.split for r in split(rows[:1], share=0.5)] == ["train"]
    with pytest.raises(BadInput, match="heldout: 1.5 is no share"):
        split(rows, share=1.5)
    with pytest.raises(BadInput, match="no row has the domain 'teas', did you mean 'tea'"):
        split(rows, share=0.5, domains=["teas"])


# agreement


def test_agreement_is_scikit_learns_kappa(tmp_path, rows):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    other = [
        replace(
            r,
            candidates=tuple(
                replace(
                    c,
                    ratings={
                        d: int(np.clip(v + random.integers(-1, 2), 0, 3)) for d, v in c.ratings.items() if d != "excess"
                    },
                )
                for c in r.candidates
            ),
        )
        for r in rows
    ]
    ours = read(bundled("tiny"), scale=load_scale())
    theirs = written(tmp_path / "b.jsonl", [own(r) for r in other])
    found = agreement(ours, theirs, load_scale())
    assert found["answers"] == 32 and found["dimensions"]["excess"] == {"answers": 0, "kappa": None, "equal": None}
    for d, line in found["dimensions"].items():
        if d != "excess":
            a, b = ([c.ratings[d] for r in side for c in r.candidates] for side in (rows, other))
            assert line["kappa"] == pytest.approx(
                metrics.cohen_kappa_score(a, b, labels=[0, 1, 2, 3], weights="quadratic")
            )
            assert line["equal"] == np.mean(np.array(a) == np.array(b)) and line["answers"] == 32
    with pytest.raises(BadInput, match="no answer has the id and the words"):
        agreement(ours, written(tmp_path / "c.jsonl", [{"id": "x", "prompt": "x", "completion": "y"}]), load_scale())


# verbs


def test_score(call, tmp_path):
    status, out, err = call("score", "bundled:tiny")
    found = json.loads(out)
    assert (status, err) == (0, "") and len(found["rows"]) == 8 and set(found["tiers"]) == {"high", "mid", "broad"}
    config = tmp_path / "c.yaml"
    config.write_text(
        "corpus: {tiers: {by: threshold, high: 0.01, mid: 0}}\narms: {a: {objective: {name: sft}, steps: 1}}\n"
    )
    assert json.loads(call("score", "bundled:tiny", "--config", config)[1])["tiers"]["high"]["rows"] == 8


def test_split_and_convert(call, tmp_path):
    status, out, _ = call(
        "split", "bundled:tiny", "--out", tmp_path / "s.jsonl", "--domains", "rain", "--heldout", "0.3"
    )
    assert status == 0 and json.loads(out)["splits"].keys() >= {"heldout", "train"}, out
    status, out, _ = call("convert", tmp_path / "s.jsonl", "--out", tmp_path / "p.jsonl", "--to", "pair")
    assert status == 0 and json.loads(out) == {"out": str(tmp_path / "p.jsonl"), "format": "pair", "rows": 24}
    status, out, err = call("convert", tmp_path / "p.jsonl", "--out", tmp_path / "q.jsonl", "--to", "pairs")
    assert (
        status == 2
        and err == f"error: to: no format is called 'pairs', did you mean 'pair'?; there are {', '.join(FORMATS)}\n"
    )
    json.loads(call("check", tmp_path / "p.jsonl", "--column", "domain=topic")[1])
    assert call("check", tmp_path / "p.jsonl", "--column", "domain")[0] == 2


def test_agree(call):
    status, out, _ = call("agree", "bundled:tiny", "bundled:tiny")
    found = json.loads(out)["dimensions"]
    assert status == 0 and all(line["kappa"] == 1.0 and line["answers"] == 32 for line in found.values())


def test_show_and_its_mask(call, tmp_path):
    status, out, err = call("show", "bundled:tiny", "--id", "tea-02")
    assert (status, err) == (0, "") and "Why is my tea bitter?" in out and "functional integration" in out
    status, out, err = call("show", "bundled:tiny", "--id", "tea-02", "--mask", "--model", "tiny-random")
    assert (status, err) == (0, "") and "Old leaf or hot water? Try one change.<|im_end|>" in out
    assert "39 of 79 tokens are trained (49%)" in out  # 38 bytes of the answer and its end of turn
    status, _, err = call("show", "bundled:tiny", "--id", "tea02")
    assert status == 2 and "id: no row is called 'tea02', did you mean 'tea-02'?" in err
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"prompt": "\x1b[2Jgone", "completion": "y"}) + "\n")
    assert "\x1b[2J" not in call("show", file)[1] and "gone" in call("show", file)[1]


def test_the_mask_of_a_whole_conversation(lm):
    from aif.tokens import encode, pieces

    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "One?"), ("assistant", "Yes."), ("user", "Two?"), ("assistant", "Too."))
    ]
    from aif.corpus.formats import conversation

    row = conversation({"messages": turns}, "f:1", None)
    found = pieces(lm.tokenizer, encode(lm.tokenizer, row, [0], 512))
    assert "".join(t for t, on in found if on) == "Yes.<|im_end|>Too.<|im_end|>"


def test_coherence_of_a_corpus(call):
    status, out, err = call(
        "coherence", "bundled:tiny", "--model", "tiny-random", "--contrast", "control", "--limit", 4, "--flips", 19
    )
    found = json.loads(out)
    assert (
        (status, err) == (0, "") and found["rows"] == 4 and len(found["layers"]) == 2 and found["contrast"] == "control"
    )
    status, _, err = call("coherence", "bundled:tiny", "--model", "tiny-random", "--contrast", "none")
    assert status == 2 and "the stances are control, deference, discernment, generic" in err
