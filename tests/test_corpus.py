"""Reading corpora: the formats that are taken, and the line that names each mistake."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aif.corpus import Conversation, Corpus, Dimension, Message, Scale, bundled, load_scale, read
from aif.corpus.check import Answer, bag_of_words, check, shared_ngrams, words
from aif.corpus.pretraining import texts
from aif.errors import BadInput

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
COMPLETION = {"prompt": "Why?", "completion": "Because."}
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def rated(**ratings: Any) -> dict:
    return {**COMPLETION, "ratings": ratings}


def answers(*contents: Any) -> dict:
    return {"prompt": "Why?", "candidates": [{"content": c} for c in contents]}


def corpus_of(folder: Path, *rows: Any, **options: Any) -> Corpus:
    """Rows (dicts, or raw lines) written to a file and read back."""
    file = folder / "rows.jsonl"
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(raw) + b"\n")
    return read(file, **{"scale": load_scale(), **options})


def only(folder: Path, row: Any, **options: Any) -> Conversation:
    (found,) = corpus_of(folder, row, **options).rows
    return found


def refusal(folder: Path, *rows: Any, **options: Any) -> str:
    """The message of the refusal, which is one line and ends with a way to mend things."""
    with pytest.raises(BadInput) as caught:
        corpus_of(folder, *rows, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and "; " in message
    return message


# formats ------------------------------------------------------------------------------------------------------------


def test_prompt_with_candidates(tmp_path):
    candidate = {
        "content": "Because.",
        "stance": "generic",
        "ratings": {"excess": 0, "playfulness": None},
        "rater": "x",
    }
    row = {"id": 7, "prompt": [USER], "candidates": [candidate, {"content": "No.", "nexus_excess": "cusp"}]}
    found = only(tmp_path, {**row, "domain": "tea", "language": "en", "split": "heldout", "source": "s"})
    assert (found.id, found.domain, found.language, found.split) == ("7", "tea", "en", "heldout")
    assert found.prompt == (Message("user", "Why?"),) and found.kind == "preference" and not found.train_turns
    assert found.where == f"{tmp_path}/rows.jsonl:1" and found.extra == {"source": "s"}
    first, second = found.candidates
    assert (first.stance, first.ratings, first.extra) == ("generic", {"excess": 0}, {"rater": "x"})
    assert (second.stance, second.ratings, second.extra) == ("", {"excess": 2}, {})


def test_messages_train_every_assistant_turn_and_stop_at_the_last(tmp_path):
    row = {"messages": [USER, ANSWER, USER, {**ANSWER, "content": "So."}, USER], "ratings": {"excess": "high"}}
    found = only(tmp_path, row)
    assert [m.role for m in found.prompt] == ["user", "assistant", "user"] and found.train_turns
    assert found.candidates[0].content == "So." and found.candidates[0].ratings == {"excess": 3}
    assert (found.kind, found.split, found.id) == ("chat", "", found.where)


def test_sharegpt(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = only(tmp_path, {"conversations": turns})
    assert found.prompt == (Message("system", "s"), Message("user", "q")) and found.candidates[0].content == "a"


@pytest.mark.parametrize("completion", ["Because.", [ANSWER], [USER, ANSWER]])
def test_prompt_with_completion(tmp_path, completion):
    found = only(tmp_path, {"prompt": [USER], "completion": completion, "nexus_playfulness": 1, "nexus_total": 9})
    assert found.prompt == (Message("user", "Why?"),) and found.kind == "chat" and not found.train_turns
    assert found.candidates[0].content == "Because." and found.candidates[0].ratings == {"playfulness": 1}
    assert found.extra == {"nexus_total": 9}


REJECTED = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {**PAIR, "messages": [USER, ANSWER]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [REJECTED]},
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, REJECTED]},
        {"chosen": [USER, ANSWER], "rejected": [USER, REJECTED]},
    ],
)
def test_preference_pair(tmp_path, row):
    found = only(tmp_path, row)
    assert found.prompt == (Message("user", "Why?"),) and found.kind == "preference"
    assert [(c.stance, c.content) for c in found.candidates] == [("chosen", "Because."), ("rejected", "No.")]


def test_text_and_scaffolding(tmp_path):
    plain, frame = corpus_of(tmp_path, {"text": "Once."}, {"text": "A frame.", "kind": "scaffolding"}).rows
    assert (plain.prompt, plain.kind, plain.candidates[0].content) == ((), "text", "Once.")
    assert (frame.kind, frame.extra) == ("scaffolding", {})
    assert only(tmp_path, {**COMPLETION, "kind": "text"}).kind == "chat"  # the format decides, the word is kept
    assert only(tmp_path, {**COMPLETION, "kind": "text"}).extra == {"kind": "text"}


def test_columns_are_renamed(tmp_path):
    row = {"question": "Why?", "response": "Because.", "prompt": "other"}
    found = only(tmp_path, row, columns={"prompt": "question", "completion": "response", "domain": "topic"})
    assert found.prompt[0].content == "Why?" and found.candidates[0].content == "Because." and found.domain == ""


def test_another_scale_brings_its_own_levels_and_flat_keys(tmp_path):
    scale = Scale("mood", ("no", "yes"), (Dimension("calm", "calm"),))
    row = {**COMPLETION, "mood_calm": "yes", "nexus_excess": 3}
    found = only(tmp_path, row, scale=scale)
    assert found.candidates[0].ratings == {"calm": 1} and found.extra == {"nexus_excess": 3}
    assert only(tmp_path, rated(anything=9), scale=None).candidates[0].ratings == {"anything": 9}


# what is taken although it looks odd ----------------------------------------------------------------------------------


def test_blank_lines_crlf_bom_and_line_separators_inside_text(tmp_path):
    text = json.dumps({"text": "a\u2028b\u0085c\x0bd\x00"}, ensure_ascii=False).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\r\n \t\n" + json.dumps({"text": "<b>=1+1; rm</b>"}).encode())
    rows = read(file).rows
    assert [r.candidates[0].content for r in rows] == ["a\u2028b\u0085c\x0bd\x00", "<b>=1+1; rm</b>"]
    assert [r.where for r in rows] == [f"{file}:1", f"{file}:4"]


def test_surrogate_pairs_unlike_halves_are_text(tmp_path):
    assert only(tmp_path, b'{"text": "\\ud83d\\ude00"}').candidates[0].content == "\U0001f600"


def test_a_line_as_long_as_the_limit_is_read(tmp_path):
    line = json.dumps(COMPLETION).encode()
    assert only(tmp_path, line, max_line_bytes=len(line))
    assert "longer than" in refusal(tmp_path, line, max_line_bytes=len(line) - 1)


def test_nesting_up_to_the_limit(tmp_path):
    assert only(tmp_path, {**COMPLETION, "deep": json.loads("[" * 63 + "]" * 63)})
    assert "nested deeper" in refusal(tmp_path, {**COMPLETION, "deep": json.loads("[" * 64 + "]" * 64)})


# bad rows -------------------------------------------------------------------------------------------------------------

BAD = {
    "trailing comma": (b'{"text": "a",}', "column 14: not JSON"),
    "broken": (b'{"text": ', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "another object on the same line"),
    "not UTF-8": (b'{"text": "\xff"}', ": not UTF-8"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "text: half of a surrogate pair, \\ud800"),
    "lone surrogate in a key": (b'{"text": "a", "\\udfff": 1}', "key: half of a surrogate pair"),
    "too deep for the parser": (b'{"text": ' + b"[" * 100_000, "nested deeper than 64"),
    "too many digits": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
    "NaN": (b'{"text": "a", "n": NaN}', "n: nan is no finite number"),
    "infinity": (b'{"text": "a", "n": -Infinity}', "n: -inf is no finite number"),
    "1e999": (b'{"text": "a", "n": 1e999}', "n: inf is no finite number"),
    "duplicate key": (b'{"text": "a", "text": "b"}', "text: the key is given twice"),
    "duplicate inner key": (b'{"text": "a", "x": {"y\\n": 1, "y\\n": 2}}', "'y\\n': the key is given twice"),
    "list": ([], "row: it is a list"),
    "string": ("a", "row: it is a string"),
    "null": (None, "row: it is null"),
    "number": (3, "row: it is a number"),
    "boolean": (True, "row: it is a boolean"),
    "no format": ({"txt": "a"}, "its keys (txt) fit no format, did you mean 'text'?"),
    "no keys": ({}, "its keys (none) fit no format"),
    "id": ({**COMPLETION, "id": [1]}, "id: must be text or a whole number, not a list"),
    "boolean id": ({**COMPLETION, "id": True}, "id: must be text or a whole number, not a boolean"),
    "domain": ({**COMPLETION, "domain": 3}, "domain: it is a number"),
    "kind": ({**COMPLETION, "kind": []}, "kind: it is a list"),
    "role missing": ({"messages": [{"content": "a"}]}, "messages[0].role: is missing"),
    "role misspelt": ({"messages": [USER, {**ANSWER, "role": "asistant"}]}, "did you mean 'assistant'?"),
    "role of another kind": ({"messages": [{**USER, "role": ["user"]}]}, "unknown role a list"),
    "sharegpt role": ({"conversations": [{"from": "humn", "value": "a"}]}, "[0].from: unknown role 'humn', did you"),
    "content missing": ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content: is missing or null"),
    "content null": ({"messages": [USER, {**ANSWER, "content": None}]}, "messages[1].content: is missing or null"),
    "content parts": (
        {"messages": [{**USER, "content": [{"text": "a"}]}, ANSWER]},
        "messages[0].content: it is a list",
    ),
    "value missing": ({"conversations": [{"from": "human"}]}, "conversations[0].value: is missing"),
    "message no object": ({"messages": ["hello"]}, "messages[0]: it is a string"),
    "messages empty": ({"messages": []}, "messages: must be a list of at least one message"),
    "messages a string": ({"messages": "hello"}, "messages: must be a list"),
    "blank answer": ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "messages[1].content: the answer is empty"),
    "answer first": ({"messages": [ANSWER, USER]}, "messages[0]: the answer comes first"),
    "tool calls": ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "messages[1].tool_calls: calls are not read"),
    "untrained turn": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages[1].weight: turns cannot be left"),
    "prompt missing": ({"completion": "a"}, "prompt: is missing"),
    "prompt blank": ({**COMPLETION, "prompt": " "}, "prompt: is empty"),
    "prompt a number": ({**COMPLETION, "prompt": 3}, "prompt: must be a list"),
    "prompt ends answered": ({**COMPLETION, "prompt": [USER, ANSWER]}, "prompt[1]: ends with the assistant's turn"),
    "completion blank": ({**COMPLETION, "completion": ""}, "completion: the answer is empty"),
    "completion of two turns": ({**COMPLETION, "completion": [ANSWER, USER]}, "completion: must hold one assistant"),
    "text blank": ({"text": " "}, "text: the answer is empty"),
    "text a number": ({"text": 3}, "text: it is a number"),
    "candidates empty": ({"prompt": "Why?", "candidates": []}, "candidates: must be a list"),
    "candidate a string": ({"prompt": "Why?", "candidates": ["a"]}, "candidates[0]: it is a string"),
    "candidate blank": (answers("a", ""), "candidates[1].content: the answer is empty"),
    "candidates equal": (answers("a", "b", "a"), "candidates[2]: says the same as candidates[0]"),
    "stance": ({"prompt": "Why?", "candidates": [{"content": "a", "stance": 1}]}, "candidates[0].stance: it is a numb"),
    "pair equal": ({**PAIR, "rejected": "Because."}, "rejected: says the same as chosen"),
    "pair one side empty": ({**PAIR, "chosen": " "}, "chosen: the answer is empty"),
    "pair one side missing": ({"prompt": "Why?", "rejected": "No."}, "chosen: is missing"),
    "pair without prompt": ({"chosen": "a", "rejected": "b"}, "prompt: is missing; give it, or give chosen"),
    "pair that shares nothing": ({"chosen": [ANSWER], "rejected": [REJECTED]}, "chosen: no message to answer"),
    "ratings a list": ({**COMPLETION, "ratings": [1]}, "ratings: it is a list"),
    "rating too high": (rated(excess=4), "ratings.excess: 4 is outside the scale; use 0..3 or low, medium, cusp, high"),
    "rating negative": (rated(excess=-1), "ratings.excess: -1 is outside the scale"),
    "rating boolean": (rated(excess=True), "ratings.excess: a boolean is no level"),
    "rating a digit in a string": (rated(excess="2"), "ratings.excess: '2' is no level"),
    "rating a float": (rated(excess=2.0), "ratings.excess: the number 2.0 is no level"),
    "rating's dimension": (
        rated(playfullness=1),
        "ratings.playfullness: no dimension of scale 'nexus', did you mean 'pl",
    ),
    "flat rating's dimension": ({**COMPLETION, "nexus_playfullness": 1}, "nexus_playfullness: no dimension"),
    "rated twice": ({**rated(excess=1), "nexus_excess": 1}, "nexus_excess: the dimension is rated twice"),
    "candidate's rating": (
        {"prompt": "Why?", "candidates": [{"content": "a", "ratings": {"excess": 9}}]},
        "s.excess: 9",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_line_and_key(tmp_path, name):
    row, expected = BAD[name]
    message = refusal(tmp_path, {"text": "A good row."}, row)
    assert message.startswith(f"{tmp_path}/rows.jsonl:2: ") and expected in message


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_can_be_skipped_and_is_listed(tmp_path, name):
    row, expected = BAD[name]
    found = corpus_of(tmp_path, {"text": "Before."}, row, {"text": "After."}, on_bad_row="skip")
    assert [r.candidates[0].content for r in found.rows] == ["Before.", "After."]
    (skipped,) = found.skipped
    assert skipped.startswith(f"{tmp_path}/rows.jsonl:2: ") and expected in skipped


def test_the_id_is_told_and_further_bad_rows_are_counted(tmp_path):
    bad = {**COMPLETION, "id": "tea-01", "domain": 1}
    assert refusal(tmp_path, bad).endswith("give text or leave it out (id 'tea-01')")
    assert refusal(tmp_path, bad, []).endswith("(and 1 more bad row)")
    assert refusal(tmp_path, bad, [], COMPLETION, []).endswith("(and 2 more bad rows)")


def test_an_id_used_twice_names_both_lines(tmp_path):
    message = refusal(tmp_path, {**COMPLETION, "id": "a"}, COMPLETION, {**PAIR, "id": "a"})
    assert message.startswith(f"{tmp_path}/rows.jsonl:3: id: 'a' was used before, at {tmp_path}/rows.jsonl:1; ")


def test_bytes_that_are_not_text_are_told_by_their_place_in_the_file(tmp_path):
    """27 bytes of BOM, first line and newline, then 10 bytes before the bad one."""
    first = b'\xef\xbb\xbf{"text": "A good row."}'
    assert ":2: byte 37: not UTF-8" in refusal(tmp_path, first, b'{"text": "\xff"}')


def test_a_long_line_is_skipped_whole(tmp_path):
    long = {"text": "a" * (3 << 20)}
    found = corpus_of(tmp_path, {"text": "b"}, long, {"text": "c"}, on_bad_row="skip", max_line_bytes=1000)
    assert [r.where[-2:] for r in found.rows] == [":1", ":3"] and "longer than 1000 bytes" in found.skipped[0]
    assert found.sha256 == corpus_of(tmp_path, {"text": "b"}, long, {"text": "c"}).sha256


# bad files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "the file has no rows"),
        (b"\xef\xbb\xbf\n\n", "the file has no rows"),
        (gzip.compress(b'{"text": "a"}', mtime=0), "1: byte 0: the file is compressed with gzip; decompress it first"),
        ('{"text": "a"}'.encode("utf-16"), "1: byte 0: the file is UTF-16"),
        (b"PAR1 and so on", "1: byte 0: the file is a parquet file"),
    ],
)
def test_files_that_are_no_corpus(tmp_path, content, expected):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}:") and expected in str(caught.value)


def test_no_usable_row_is_an_error_even_when_skipping(tmp_path):
    message = refusal(tmp_path, [], {}, on_bad_row="skip")
    assert message.startswith(f"{tmp_path}/rows.jsonl: all 2 rows are bad, the first: {tmp_path}/rows.jsonl:1: ")


def test_paths_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "no": "no such file",
        tmp_path: "a folder",
        tmp_path / "pipe": "a pipe",
        "/dev/zero": "a device",
    }
    for path, expected in cases.items():
        with pytest.raises(BadInput, match=expected) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
    with pytest.raises(BadInput, match="cannot be read"):
        read("a\0b")


def test_options_are_checked(tmp_path):
    assert "on_bad_row: 'ignore' is not known" in refusal(tmp_path, COMPLETION, on_bad_row="ignore")
    assert "columns.mesages: no name of ours, did you mean 'messages'?" in refusal(
        tmp_path, COMPLETION, columns={"mesages": "x"}
    )
    assert "columns: 'x' is given two names" in refusal(tmp_path, COMPLETION, columns={"prompt": "x", "text": "x"})
    with pytest.raises(BadInput, match="bundled:tidy: no such corpus, did you mean 'tiny'"):
        bundled("tidy")


# the bundled corpus ---------------------------------------------------------------------------------------------------


def test_the_bundled_corpus_is_balanced_rated_and_split():
    scale = load_scale()
    corpus = read(bundled(), scale=scale)
    found = check(corpus, scale)
    assert len(found["domains"]) >= 12 and found["shared_12_grams"]["pairs"] == 0
    assert found["repeated_answers"] == found["repeated_prompts"] == found["control_characters"] == 0
    assert found["length_spread"] < 0.1
    for row in corpus.rows:
        assert [c.stance for c in row.candidates] == ["control", "deference", "generic", "discernment"]
        assert all(len(c.ratings) == 15 and 60 <= len(c.content.split()) <= 160 for c in row.candidates)
    heldout = {r.domain for r in corpus.rows if r.split == "heldout_domain"}
    assert heldout == {"music", "repair", "migration"}
    for domain, counts in found["domains"].items():
        expected = {"heldout_domain"} if domain in heldout else {"train", "heldout"}
        assert set(counts) - {"rows"} == expected and counts.get("heldout", 1) == 1
    for dimension in scale.dimensions:
        assert all(stance["variance"][dimension.id] > 0 for stance in found["stances"].values())


# statistics -----------------------------------------------------------------------------------------------------------


def _answers(tmp_path: Path, *contents: str) -> list[Answer]:
    rows = corpus_of(tmp_path, *({**answers(c), "id": f"r{k}"} for k, c in enumerate(contents))).rows
    return [Answer(r, r.candidates[0], words(r.candidates[0].content)) for r in rows]


def test_twelve_shared_words_are_found_across_punctuation_and_case(tmp_path):
    run = "one two three four five six seven eight nine ten eleven twelve"
    found = shared_ngrams(_answers(tmp_path, f"Well: {run}.", f"{run.title()}, and more", run.replace("six", "6")))
    assert found == {"pairs": 1, "first": [{"answers": ["r0", "r1"], "words": run}]}


def test_check_counts_what_it_says(tmp_path):
    first = {**answers("a b c d", "a\x00 b"), "id": "1", "domain": "tea", "split": "train"}
    first["candidates"][0] |= {"stance": "x", "ratings": {"excess": 0}}
    second = {**answers("a b c d"), "id": "2", "domain": "tea"}
    second["candidates"][0] |= {"stance": "x", "ratings": {"excess": 2}}
    found = check(corpus_of(tmp_path, first, second), load_scale())
    assert found["domains"] == {"tea": {"rows": 2, "": 1, "train": 1}} and found["kinds"] == {
        "chat": 1,
        "preference": 1,
    }
    assert (found["repeated_answers"], found["repeated_prompts"], found["control_characters"]) == (1, 1, 1)
    x = found["stances"]["x"]
    assert (x["answers"], x["words"]["mean"], x["distinct_3"], x["rated"]) == (2, 4.0, 0.5, 2)
    assert (x["mean"]["excess"], x["variance"]["excess"], x["mean"]["playfulness"]) == (1.0, 2.0, None)
    assert found["length_spread"] == 0.4  # mean lengths 4 and 2 words, 10/3 over all: 1 - 2 / (10/3)
    json.dumps(found, allow_nan=False)


def test_a_bag_of_words_tells_stances_that_have_words_of_their_own(tmp_path):
    pytest.importorskip("sklearn")
    rows = [
        {
            "id": str(k),
            "prompt": "Why?",
            "candidates": [
                {"content": f"must must n{k}", "stance": "control"},
                {"content": f"perhaps n{k}", "stance": "open"},
            ],
        }
        for k in range(6)
    ]
    found = corpus_of(tmp_path, *rows).rows
    told = bag_of_words([Answer(r, c, words(c.content)) for r in found for c in r.candidates], folds=3)
    assert told and (told["accuracy"], told["chance"], told["folds"]) == (1.0, 0.5, 3)
    assert told["telling_words"]["control"][0] == "must" and told["telling_words"]["open"][0] == "perhaps"
    assert bag_of_words([Answer(r, r.candidates[0], ("a",)) for r in found]) is None


# plain text -----------------------------------------------------------------------------------------------------------


def test_the_standard_librarys_text_is_varied_and_the_same_every_time():
    found = texts("pydoc", 60)
    assert found == texts("pydoc", 60) != texts("pydoc", 60, seed=1)
    assert len(set(found)) == 60 and all(100 <= len(t) <= 2000 for t in found)
    assert all(50 <= len(t) <= 300 for t in texts("pydoc", 60, min_chars=50, max_chars=300))


def test_texts_from_files(tmp_path):
    paragraphs = [f"Paragraph {k} " + "word " * 8 for k in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in paragraphs))
    plain = texts(str(tmp_path / "a.txt"), 5, min_chars=20, max_chars=60)
    assert sorted(plain) == sorted({p.strip() for p in paragraphs} & set(plain))
    assert plain == texts(str(tmp_path / "a.jsonl"), 5, min_chars=20, max_chars=60)
    joined = texts(str(tmp_path / "a.txt"), 2, min_chars=150, max_chars=200)
    assert all(3 == t.count("Paragraph") for t in joined)
    (tmp_path / "b.txt").write_text("x" * 500)
    assert [len(t) for t in texts(str(tmp_path / "b.txt"), 1, min_chars=101, max_chars=300)] in ([300], [200])


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"short", "0 passages of 100 to 2000 characters, 2 are needed"),
        ("a.txt", b"", "0 passages"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.jsonl", b'{"txt": 1}', "1: text: is missing"),
        ("a.jsonl", b'{"text": "a"}\n{', "2: column 2: not JSON"),
        ("a.jsonl", gzip.compress(b"a", mtime=0), "compressed with gzip"),
        ("a.doc", b"a", "not a source of text; use pydoc"),
    ],
)
def test_texts_refusals(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        texts(str(tmp_path / name), 2)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}:") and expected in message and len(message.splitlines()) == 1


def test_texts_of_nothing():
    with pytest.raises(BadInput, match="there is no such file"):
        texts("nowhere.txt", 1)
    with pytest.raises(BadInput, match="leave nothing"):
        texts("pydoc", 0)
    with pytest.raises(BadInput, match="pydoc: .* passages"):
        texts("pydoc", 10**6)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BadInput, match=r"aif\[hf\]"):
        texts(str(tmp_path / "a.parquet"), 1)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a" * 150, None, "b" * 150]}), tmp_path / "a.parquet")
    assert sorted(texts(str(tmp_path / "a.parquet"), 2)) == ["a" * 150, "b" * 150]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no more")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "c.parquet")
    for name, expected in (("b", "no readable parquet"), ("c", "no such column")):
        with pytest.raises(BadInput, match=expected):
            texts(str(tmp_path / f"{name}.parquet"), 1)


def test_reading_a_corpus_needs_no_jax():
    code = "import sys, aif.corpus.check, aif.corpus.pretraining; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
