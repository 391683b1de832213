"""Plain text like that of pre-training, for measures that compare models away from the corpus."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from aif.corpus import parquet
from aif.corpus.jsonl import lines, parse, refuse_foreign, regular_file, sound_row
from aif.errors import BadInput

PYDOC = "pydoc"
LINE_BYTES = 64 << 20


def texts(source: str, n: int, min_chars: int = 100, max_chars: int = 2000, seed: int = 0) -> list[str]:
    """`n` different passages of `min_chars` to `max_chars` characters, drawn in an order that `seed` alone decides.

    Passages are runs of whole paragraphs, cut between words only where one paragraph is too long. A file larger than
    20 n + 1000 passages is drawn from within its beginning.

    Args:
      source: "pydoc" is the language reference in the standard library (its wording changes with the Python version);
        otherwise a file: .txt, .jsonl or .parquet, the last two with a `text` column.

    Raises:
      BadInput: the source is unknown or unreadable, or holds fewer than `n` such passages.
    """
    if n < 1 or not 0 < min_chars <= max_chars:
        raise BadInput(f"texts: n={n}, min_chars={min_chars}, max_chars={max_chars} leave nothing; widen them")
    cut = (piece for document in _documents(source) for piece in _passages(document, max_chars))
    fresh = _unique(piece for piece in cut if len(piece) >= min_chars)
    found = list(fresh) if source == PYDOC else list(itertools.islice(fresh, 20 * n + 1000))
    if len(found) < n:
        raise BadInput(
            f"{source}: {len(found)} passages of {min_chars} to {max_chars} characters, {n} are needed; "
            "ask for fewer or give more text"
        )
    return random.Random(seed).sample(found, n)


def _documents(source: str) -> Iterable[str]:
    if source == PYDOC:
        from pydoc_data.topics import topics

        return (topics[name] for name in sorted(topics))
    readers = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}
    ending = Path(source).suffix.lower()
    if ending not in readers:
        raise BadInput(f"{source}: not a source of text; use {PYDOC}, or a .txt, .jsonl or .parquet file")
    return readers[ending](regular_file(source))


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
        if passage not in seen:
            seen.add(passage)
            yield passage


__all__ = ["texts"]
