"""Plain text like that of pre-training, for measures that compare models away from the corpus.

Four kinds of source behind one protocol: a local file, a data set streamed from the Hub, the documentation in the
standard library (the default, offline), and, in `aif.own_text`, a model's own samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from aif.corpus import parquet
from aif.corpus.jsonl import lines, parse, refuse_foreign, regular_file, sound_row
from aif.errors import BadInput

PYDOC = "pydoc"
HUB = "hub:"
NAMED = {"fineweb": "hub:HuggingFaceFW/fineweb:sample-10BT"}
LINE_BYTES = 64 << 20


class Source(Protocol):
    """Where text comes from. Its documents are told apart: no passage reaches over the end of one."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def pool(self, n: int) -> int | None:
        """How many passages are read before n of them are drawn; None for all there are."""
        ...

    def documents(self) -> Iterable[str]:
        """The documents, in an order of the source's own."""
        ...


def texts(source: str | Source, n: int, min_chars: int = 100, max_chars: int = 2000, seed: int = 0) -> list[str]:
    """`n` different passages of `min_chars` to `max_chars` characters, drawn in an order that `seed` alone decides.

    Passages are runs of whole paragraphs of one document, cut between words only where one paragraph is too long.
    Passages that differ in white space only are one.

    Args:
      source: "pydoc" is the language reference in the standard library (its wording changes with the Python version);
        "fineweb" or "hub:OWNER/NAME[:CONFIG]" is the beginning of a data set's training split, streamed; otherwise a
        file: .txt, .jsonl or .parquet, the last two with a `text` column; or a source of one's own.

    Raises:
      BadInput: the source is unknown or cannot be read, or holds fewer than `n` such passages.
    """
    if n < 1 or not 0 < min_chars <= max_chars:
        raise BadInput(f"texts: n={n}, min_chars={min_chars}, max_chars={max_chars} leave nothing; widen them")
    found_source = source_of(source) if isinstance(source, str) else source
    cut = (piece for document in found_source.documents() for piece in _passages(document, max_chars))
    fresh = _unique(piece for piece in cut if len(piece) >= min_chars)
    found = list(itertools.islice(fresh, found_source.pool(n)))
    if len(found) < n:
        raise BadInput(
            f"{found_source.name}: {len(found)} passages of {min_chars} to {max_chars} characters, {n} are needed; "
            "ask for fewer or give more text"
        )
    return random.Random(seed).sample(found, n)


def source_of(text: str) -> Source:
    """The source that a config's word stands for.

    Raises:
      BadInput: it is none, or the file is not there.
    """
    text = NAMED.get(text, text)
    if text == PYDOC:
        return Pydoc()
    if text.startswith(HUB):
        name, _, config = text.removeprefix(HUB).partition(":")
        return Hub(name, config or None)
    if Path(text).suffix.lower() not in READERS:
        known = f"{PYDOC}, {', '.join(NAMED)}, {HUB}OWNER/NAME, or a .txt, .jsonl or .parquet file"
        raise BadInput(f"{text}: not a source of text; use {known}")
    return File(regular_file(text))


@dataclass(frozen=True)
class Pydoc:
    """Topics of the language reference that ships with Python."""

    name: str = PYDOC

    def pool(self, n: int) -> int | None:
        return None

    def documents(self) -> Iterable[str]:
        from pydoc_data.topics import topics

        return (topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class File:
    """A local file; a large one is drawn from within its beginning."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def pool(self, n: int) -> int | None:
        return 20 * n + 1000

    def documents(self) -> Iterable[str]:
        return READERS[self.path.suffix.lower()](self.path)


@dataclass(frozen=True)
class Hub:
    """The training split of a data set on the Hugging Face Hub, streamed: only what is read is fetched."""

    repository: str
    config: str | None = None

    @property
    def name(self) -> str:
        return f"{HUB}{self.repository}"

    def pool(self, n: int) -> int | None:
        return 4 * n + 100

    def documents(self) -> Iterator[str]:
        """Raises BadInput where `datasets` is missing, the Hub cannot be reached, or there is no text column."""
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise BadInput(f"{self.name}: streaming needs datasets; pip install 'aif[hf]', or use {PYDOC}") from error
        try:
            for row in load_dataset(self.repository, self.config, split="train", streaming=True):
                if not isinstance(row.get("text"), str):
                    raise BadInput(f"{self.name}: text: no such column; name a data set that has one")
                yield row["text"]
        except BadInput:
            raise
        except (
            Exception
        ) as error:  # the Hub's clients raise many kinds, all of them its word on the name or the network
            said = " ".join(str(error).split())[:120] or type(error).__name__
            fix = f"check the name and the network, or use {PYDOC}"
            raise BadInput(f"{self.name}: cannot be streamed ({said}); {fix}") from error


def _txt(path: Path) -> Iterator[str]:
    refuse_foreign(path)
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}:1: byte {error.start}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def _jsonl(path: Path) -> Iterator[str]:
    refuse_foreign(path)
    with path.open("rb") as stream:
        for number, offset, line in lines(stream, LINE_BYTES):
            if line is None:
                raise BadInput(f"{path}:{number}: row: longer than {LINE_BYTES} bytes; split it")
            try:
                row = sound_row(parse(line, offset))
            except BadInput as error:
                raise BadInput(f"{path}:{number}: {error}") from None
            if not isinstance(row.get("text"), str):
                raise BadInput(f"{path}:{number}: text: is missing or no text; give every row a text key")
            yield row["text"]


def _parquet(path: Path) -> Iterator[str]:
    yield from (str(row["text"]) for row in parquet.rows(path, ["text"]) if row["text"])


READERS = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _passages(document: str, max_chars: int) -> Iterator[str]:
    """Runs of paragraphs, each as long as `max_chars` allows."""
    passage = ""
    for paragraph in document.replace("\r\n", "\n").split("\n\n"):
        for piece in _pieces(paragraph.strip("\n"), max_chars):
            if passage and len(passage) + 2 + len(piece) > max_chars:
                yield passage.strip()
                passage = ""
            passage = f"{passage}\n\n{piece}" if passage else piece
    if passage.strip():
        yield passage.strip()


def _pieces(paragraph: str, max_chars: int) -> Iterator[str]:
    """The paragraph, cut at the last white space that keeps every piece within `max_chars`."""
    while len(paragraph) > max_chars:
        border = max(paragraph.rfind(space, 1, max_chars + 1) for space in " \n\t")
        border = border if border > 0 else max_chars
        yield paragraph[:border]
        paragraph = paragraph[border:].lstrip()
    if paragraph.strip():
        yield paragraph


def _unique(passages: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for passage in passages:
        words = " ".join(passage.split())
        if words not in seen:
            seen.add(words)
            yield passage


__all__ = ["Source", "source_of", "texts"]
