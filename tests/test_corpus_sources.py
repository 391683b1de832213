"""Text like that of pre-training: every source behind one protocol, its boundaries, repeats and order."""

from __future__ import annotations

import sys
from types import ModuleType

import jax
import pytest

from aif.basins import Bench
from aif.basins.significance import Options, text_data
from aif.batches import build
from aif.corpus.pretraining import File, Hub, Pydoc, source_of, texts
from aif.errors import BadInput
from aif.own_text import OwnText


class Given:
    name = "given"

    def __init__(self, *documents: str):
        self.all = documents

    def pool(self, n: int) -> int | None:
        return None

    def documents(self):
        return self.all


def test_words_of_a_config_name_sources(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert source_of("pydoc") == Pydoc() and source_of(str(tmp_path / "a.txt")) == File(tmp_path / "a.txt")
    assert source_of("fineweb") == Hub("HuggingFaceFW/fineweb", "sample-10BT")
    assert source_of("hub:me/mine") == Hub("me/mine") and source_of("hub:me/mine:sub").config == "sub"
    with pytest.raises(BadInput, match="finweb: not a source of text; use pydoc, fineweb, hub:OWNER/NAME"):
        source_of("finweb")


def test_no_passage_reaches_over_the_end_of_a_document():
    documents = [f"{letter * 30}\n\n{letter * 40}" for letter in "abcdefgh"]
    found = texts(Given(*documents), 8, min_chars=10, max_chars=5000)
    assert sorted(found) == documents  # short ones are not joined


def test_passages_that_differ_in_white_space_are_one():
    source = Given("one two  three", "one two three", "one\ntwo three ", "four five six")
    assert len(texts(source, 2, min_chars=5)) == 2
    with pytest.raises(BadInput, match="given: 2 passages"):
        texts(source, 3, min_chars=5)


def test_the_seed_draws_and_orders():
    source = Given(*(f"passage number {k}" for k in range(50)))
    first = texts(source, 5, min_chars=5, seed=1)
    assert first == texts(source, 5, min_chars=5, seed=1) != texts(source, 5, min_chars=5, seed=2)


def hub(monkeypatch, rows) -> list:
    """A stand-in for `datasets` that streams these rows, or fails with an error among them; calls are listed."""
    calls: list = []

    def load_dataset(*words, **options):
        calls.append((words, options))
        for row in rows:
            if isinstance(row, Exception):
                raise row
            calls.append(row)
            yield row

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_the_hub_is_streamed_and_read_no_further_than_needed(monkeypatch):
    calls = hub(monkeypatch, ({"text": f"web page number {k} " + "word " * 30, "url": "u"} for k in range(10**6)))
    found = texts("fineweb", 3)
    assert len(found) == 3 and all(t.startswith("web page number") for t in found)
    assert calls[0] == (("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True})
    assert len(calls) - 1 == 4 * 3 + 100


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            ConnectionError("Couldn't reach\nthe Hub"),
            "hub:a/b: cannot be streamed .Couldn't reach the Hub.; check the name",
        ),
        ({"body": "x"}, "hub:a/b: text: no such column"),
    ],
)
def test_a_hub_that_cannot_be_read_is_named(monkeypatch, row, expected):
    hub(monkeypatch, [row])
    with pytest.raises(BadInput, match=expected) as caught:
        texts("hub:a/b", 1)
    assert len(str(caught.value).splitlines()) == 1


def test_a_hub_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'aif\[hf\]', or use pydoc"):
        texts("fineweb", 1)


def test_the_models_own_text_is_seeded_and_bounded(lm, base):
    own = OwnText(base, lm.tokenizer, 3, tokens=24, together=4)
    found = texts(own, 3, min_chars=1)
    assert len(set(found)) == 3 and found == texts(own, 3, min_chars=1)
    assert found != texts(OwnText(base, lm.tokenizer, 3, tokens=24, together=4, seed=1), 3, min_chars=1)
    with pytest.raises(BadInput, match="samples: 0 passages of 1000 to 2000"):
        texts(own, 3, min_chars=1000)


def test_significance_takes_the_models_own_text(lm, base, rows, monkeypatch):
    data = build(rows[:2], lm.tokenizer, which="target", length=256, target="discernment")
    same = {"target": data, "alternatives": data, "alternatives_elsewhere": data}
    bench = Bench(base=base, subjects=[], tokenizer=lm.tokenizer, rows=1, key=jax.random.key(0), **same)
    seen = []
    taken = lambda source, n, **options: seen.append(source) or [f"Some text {k}." for k in range(n)]  # noqa: E731
    monkeypatch.setattr("aif.basins.significance.texts", taken)
    assert len(text_data(bench, Options(source="samples", texts=2, tokens=64)).owners) == 2
    assert isinstance(seen[0], OwnText) and seen[0].count == 2 and seen[0].tokens == 64
