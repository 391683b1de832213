"""From conversations to packed batches: encode once, shuffle, pack and batch with grain.

Rows of `length` tokens are filled first-fit with whole prompts and their responses, so a step costs the same whatever
the objective and almost no token is padding. The iterator's state is small and restores exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import grain
import numpy as np

from aif.corpus import Conversation
from aif.corpus.jsonl import told
from aif.errors import BadInput
from aif.tokens import Encoded, encode
from aif.types import Batch

WHICH = ("target", "pair", "all")
GRAIN = 32  # row lengths are tried in steps of so many tokens
EVEN = 1700  # row length at which attention costs as much as everything else, roughly: a small model on a CPU
BINS = 16  # rows that are open for packing at a time when every example is visited once
Tables = dict[str, np.ndarray]  # facts per response of the data set, [responses, ...]; `Batch.ids` is the row number


@dataclass(frozen=True)
class Dataset:
    """Encoded prompts of a corpus with the facts of every response.

    `examples` are the features grain packs; `tables` are looked up per batch by response id; `owners[i]` says which
    (row, candidate) of the corpus response i is. `beside` holds the rows of a second kind, if an objective has two.
    """

    examples: tuple[dict[str, np.ndarray], ...]
    tables: Tables
    owners: tuple[tuple[int, int], ...]
    length: int
    scored: int
    slots: int
    beside: Dataset | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of every token, its role and the ratings, which a resumed run must meet again."""
        digest = hashlib.sha256((self.beside.fingerprint if self.beside else "").encode())
        for example in self.examples:
            for name in sorted(example):
                digest.update(example[name].tobytes())
        for name in ("preference", "ratings"):
            digest.update(self.tables.get(name, np.zeros(0)).tobytes())
        return digest.hexdigest()[:16]

    @property
    def prompts(self) -> np.ndarray:
        """The prompt that each response answers, as the number of its row."""
        return np.array(self.owners)[:, 0]

    def with_tables(self, tables: Tables) -> Dataset:
        """The same data with more facts per response."""
        return replace(self, tables={**self.tables, **tables})

    def some(self, prompts: int | None) -> Dataset:
        """So many of the prompts, spread evenly over the data, with all their responses; all of them for None."""
        if prompts is None or prompts >= len(self.examples):
            return self
        return self.only(evenly(len(self.examples), prompts))

    def only(self, prompts: Sequence[int]) -> Dataset:
        """These prompts, by number, with all their responses."""
        kept = [self.examples[k] for k in prompts]
        ids = np.concatenate([e["ids"] for e in kept])
        ends = np.cumsum([len(e["ids"]) for e in kept])
        examples = [
            {**e, "ids": np.arange(end - len(e["ids"]), end, dtype=np.int32)} for e, end in zip(kept, ends, strict=True)
        ]
        tables = {name: table[ids] for name, table in self.tables.items()}
        return replace(self, examples=tuple(examples), tables=tables, owners=tuple(self.owners[i] for i in ids))

    @property
    def sizes(self) -> np.ndarray:
        """(tokens, scored tokens, responses) of every example, `[examples, 3]`."""
        return np.array([(len(e["tokens"]), len(e["targets"]), len(e["ids"])) for e in self.examples])

    @cached_property
    def tight(self) -> Dataset:
        """The same data at the row length that costs least when every example is visited once."""
        sizes = self.sizes
        shortest = -(-int(sizes[:, 0].max()) // GRAIN) * GRAIN
        lengths = [*range(min(shortest, self.length), self.length, GRAIN), self.length]
        rooms = [(T, *_capacity(list(self.examples), T)) for T in lengths]
        cost = lambda room: _rows_needed(sizes, room) * room[0] * (1 + room[0] / EVEN)  # noqa: E731
        length, scored, slots = min(rooms, key=cost)
        return replace(self, length=length, scored=scored, slots=slots)


def evenly(n: int, m: int) -> list[int]:
    """m of the numbers 0..n-1, evenly spread."""
    return [k * n // m for k in range(m)]


def stance_order(row: Conversation, target: str) -> list[int]:
    """Candidates with the target stance first, the others in their order."""
    return sorted(range(len(row.candidates)), key=lambda k: row.candidates[k].stance not in (target, "chosen"))


def choose(row: Conversation, which: str, target: str, number: int) -> list[int]:
    """Candidates of a row that an objective trains on: the target, the target against one contrast (which one turns
    with the row's number, so that all contrast stances take part), or all."""
    order = stance_order(row, target)
    if which == "target" or len(order) == 1:
        return order[:1]
    return [order[0], order[1 + number % (len(order) - 1)]] if which == "pair" else order


def build(
    rows: Sequence[Conversation],
    tokenizer: Any,
    *,
    which: str,
    length: int,
    target: str,
    dimensions: Sequence[str] = (),
    weights: Sequence[float] | None = None,
) -> Dataset:
    """Encode `rows` for an objective that trains on `which` of {target, pair, all} candidates.

    Tables: `preference` is +1 for the target stance and -1 for the others; `ratings` `[responses, S]` holds levels,
    -1 where unrated.

    Raises:
      BadInput: a row cannot be encoded or does not fit; none of its answers is the target; `pair` or `all` with a
        single-candidate row; no rows.
    """
    if not rows:
        raise BadInput("corpus: no rows to train on; check corpus.path, corpus.split and corpus.domains")
    trees, owners, preference, ratings = [], [], [], []
    for number, row in enumerate(rows):
        if not row.candidates:
            raise BadInput(f"{row.where}: prompt: has no answer to train on; add one, or sample answers{told(row.id)}")
        if which != "target" and len(row.candidates) < 2:
            raise BadInput(f"{row.where}: this objective compares candidates and the row has one; add alternatives")
        if which != "target" and row.train_turns:
            raise BadInput(
                f"{row.where}: a row that trains its earlier turns cannot be compared; leave `train_turns` out"
            )
        if (
            which != "all"
            and len(row.candidates) > 1
            and not any(c.stance in (target, "chosen") for c in row.candidates)
        ):
            there = ", ".join(sorted({c.stance or "none" for c in row.candidates}))
            raise BadInput(
                f"{row.where}: no answer of stance {target!r} to train on; name one of {there} as target{told(row.id)}"
            )
        chosen = choose(row, which, target, number)
        trees.append(encode(tokenizer, row, chosen, length))
        for k in chosen:
            candidate = row.candidates[k]
            owners.append((number, k))
            preference.append(1.0 if candidate.stance in (target, "chosen") else -1.0)
            ratings.append([candidate.ratings.get(d, -1) for d in dimensions])
    tables: Tables = {"preference": np.array(preference, np.float32)}
    if dimensions:
        tables["ratings"] = np.array(ratings, np.int32)
    return from_trees(trees, tables, owners, length=length, weights=weights)


def from_trees(
    trees: Sequence[Encoded],
    tables: Tables,
    owners: Sequence[tuple[int, int]],
    *,
    length: int,
    weights: Sequence[float] | None = None,
) -> Dataset:
    """A data set of prompts that are token trees already, with facts per response and a weight per prompt."""
    examples, first = [], 0
    for number, e in enumerate(trees):
        count = int(e.response.max()) + 1
        weight = 1.0 if weights is None else weights[number]
        named = {k: getattr(e, k) for k in ("tokens", "positions", "branches", "index", "targets", "response")}
        named["weights"] = np.full(len(e.targets), weight, np.float32)
        examples.append(named | {"ids": np.arange(first, first + count, dtype=np.int32)})
        first += count
    return Dataset(tuple(examples), tables, tuple(owners), length, *_capacity(examples, length))


def _capacity(examples: list[dict[str, np.ndarray]], length: int) -> tuple[int, int]:
    """Scored tokens and response slots of a row: the mean share with room to spare, never less than the largest."""
    tokens = sum(len(e["tokens"]) for e in examples)
    scored = max(length * sum(len(e["targets"]) for e in examples) / tokens, max(len(e["targets"]) for e in examples))
    slots = max(1.5 * length * sum(len(e["ids"]) for e in examples) / tokens, max(len(e["ids"]) for e in examples))
    return int(-(-scored // 16) * 16), int(slots) + 1


def _rows_needed(sizes: np.ndarray, room: tuple[int, int, int]) -> int:
    """Rows that first-fit packing with `BINS` open rows fills; `sizes` and `room` are (tokens, scored, slots)."""
    rows, left = 0, np.zeros((0, 3), int)
    for size in sizes:
        fits = np.flatnonzero((left >= size).all(axis=1))
        if len(fits):
            left[fits[0]] -= size
        else:
            rows, left = rows + 1, np.concatenate([left, [np.array(room) - size]])[-BINS:]
    return rows


def stream(data: Dataset, *, rows: int, seed: int, start: dict | None = None) -> grain.DatasetIterator:
    """Endless shuffled batches of `rows` packed rows. The order depends on `seed` alone."""
    source = grain.MapDataset.source(data.examples).seed(seed).shuffle().repeat().to_iter_dataset()
    iterator = iter(_packed(source, data, 2 * rows).batch(rows).map(lambda packed: _batch(packed, data.tables)))
    if start is not None:
        iterator.set_state(start)
    return iterator


def once(data: Dataset, *, rows: int, even: int = 1) -> Iterator[Batch]:
    """Every example exactly once, in rows of the `tight` length and at most as many of them as hold `rows` rows'
    tokens: a multiple of `even`, the same for all batches. The last one is filled up with empty rows."""
    most, data = max(1, rows * data.length // data.tight.length), data.tight
    needed = _rows_needed(data.sizes, (data.length, data.scored, data.slots))
    rows = -(-needed // -(-needed // most))  # shared evenly by as few batches as there can be
    rows = min(-(-rows // even), max(1, most // even)) * even
    source = grain.MapDataset.source(data.examples).to_iter_dataset()
    for packed in _packed(source, data, BINS * rows).batch(rows, drop_remainder=False):
        short = rows - len(packed["tokens"])
        if short:
            blank = {k: np.full((short, v.shape[1]), -1 if k == "ids" else 0, v.dtype) for k, v in packed.items()}
            packed = {k: np.concatenate([v, blank[k]]) for k, v in packed.items()}
        yield _batch(packed, data.tables)


def _packed(source: Any, data: Dataset, bins: int) -> Any:
    T, N, R = data.length, data.scored, data.slots
    lengths = {"tokens": T, "positions": T, "branches": T, "index": N, "targets": N, "weights": N, "response": N}
    padding = dict.fromkeys(lengths, 0) | {"ids": -1}
    return grain.experimental.FirstFitPackIterDataset(
        source,
        length_struct=lengths | {"ids": R},
        padding_struct=padding,
        num_packing_bins=bins,
        shuffle_bins=False,
    )


def one_per_row(trees: Sequence[Encoded], length: int, scored: int, slots: int) -> Batch:
    """A batch with one prompt and its responses per row; response ids run on from row to row."""
    widths = {"tokens": length, "positions": length, "branches": length}
    widths |= {"index": scored, "targets": scored, "response": scored}
    packed: dict[str, np.ndarray] = {k: np.zeros((len(trees), width), np.int32) for k, width in widths.items()}
    for name in ("tokens", "index", "ids"):
        packed[f"{name}_segment_ids"] = np.zeros((len(trees), {**widths, "ids": slots}[name]), np.int32)
    packed["weights"] = np.zeros((len(trees), scored), np.float32)
    packed["ids"] = np.full((len(trees), slots), -1, np.int32)
    first = 0
    for row, tree in enumerate(trees):
        count = int(tree.response.max()) + 1
        for name in widths:
            values = getattr(tree, name)
            packed[name][row, : len(values)] = values
        packed["weights"][row, : len(tree.targets)] = 1.0
        packed["ids"][row, :count] = np.arange(first, first + count)
        for name, n in (("tokens", len(tree.tokens)), ("index", len(tree.targets)), ("ids", count)):
            packed[f"{name}_segment_ids"][row, :n] = 1
        first += count
    return _batch(packed, {})


def _starts(segments: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Where the segment named by each entry of `of` begins within its row of `segments`; 0 for padding."""
    earlier = (segments[:, None, :] > 0) & (segments[:, None, :] < of[:, :, None])
    return earlier.sum(axis=-1)


def _batch(packed: dict[str, np.ndarray], tables: Tables) -> Batch:
    """Local indices of each packed example become indices of its row; tables are looked up by response id."""
    scored = packed["index_segment_ids"]
    index = packed["index"] + _starts(packed["tokens_segment_ids"], scored)
    response = packed["response"] + _starts(packed["ids_segment_ids"], scored)
    ids = packed["ids"]
    extras = {}
    for name, table in tables.items():
        rows = table[np.maximum(ids, 0)]
        extras[name] = np.where((ids >= 0).reshape(ids.shape + (1,) * (rows.ndim - 2)), rows, np.zeros((), rows.dtype))
    parts: dict[str, Any] = {
        "tokens": packed["tokens"],
        "positions": packed["positions"],
        "segments": packed["tokens_segment_ids"],
        "branches": packed["branches"],
        "index": index.astype(np.int32),
        "targets": packed["targets"],
        "weights": packed["weights"],
        "response": response.astype(np.int32),
        "group": (packed["ids_segment_ids"] - 1).astype(np.int32),
        "ids": ids,
    }
    return Batch(**parts, extras=extras)
