"""Residuals at the ends of texts: shared beginnings are read once, and the numbers are those of each text alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aif.directions.pairs import from_pairs, read_pairs
from aif.directions.texts import Family, end_residuals, families, shared_rows
from aif.errors import BadInput
from aif.models.decoder import forward

TEXTS = [[7, 8, 9, 1, 2], [7, 8, 9, 1], [7, 8, 9], [7, 8, 9, 3, 3], [5], [5, 6], [7, 8, 9, 1, 2], [20, 21], [7]]


def test_families_by_hand():
    """(7 8 9 1 2) and (7 8 9 3 3) share three tokens; what begins another adds nothing; 11 of 28 tokens stay."""
    found = families(TEXTS, 64)
    assert found == [Family(1, [(5, 6)]), Family(3, [(7, 8, 9, 1, 2), (7, 8, 9, 3, 3)]), Family(1, [(20, 21)])]
    data, place = shared_rows(TEXTS, 64)
    assert sum(len(e["tokens"]) for e in data.examples) == 2 + 7 + 2
    assert place[0] == place[6] and len(set(place)) == 8 == len(data.owners)


def test_a_family_stays_within_a_row():
    assert [f.texts for f in families(TEXTS[:4], 6)] == [[(7, 8, 9, 1, 2)], [(7, 8, 9, 3, 3)]]


@pytest.mark.parametrize("rows", [1, 3])
def test_each_text_reads_as_if_it_were_alone(base, rows):
    """Against a plain forward of every text by itself."""
    got = end_residuals(base, TEXTS, rows=rows, length=16)
    run = jax.jit(lambda p, t: forward(p.config, p.params, t, tap=lambda h: h).taps)
    for text, means in zip(TEXTS, got.means, strict=True):
        alone = np.asarray(run(base, np.pad(text, (0, 8 - len(text)))[None]))[:, 0, len(text) - 1]
        np.testing.assert_allclose(means, alone, rtol=0, atol=2e-5)
    np.testing.assert_allclose(got.norms, np.linalg.norm(got.means, axis=-1).mean(axis=0), rtol=1e-6)


def test_a_direction_from_pairs_of_texts(lm, base, tmp_path):
    """Texts as they stand, a special token as one; the mean difference by hand."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"positive": "<|im_start|>yes", "negative": "no"}\n\n{"positive": "aye", "negative": "nay"}\n')
    pairs, digest = read_pairs(path)
    found = from_pairs(lm, pairs, data=digest, layer=1, method="mean")
    texts = [[257, *b"yes"], list(b"no"), list(b"aye"), list(b"nay")]
    means = end_residuals(base, texts).means
    np.testing.assert_allclose(found.vector, (means[0] + means[2] - means[1] - means[3]) / 2, atol=1e-5)
    assert found.provenance["tokens_pooled"] == "last token of the response" and found.provenance["data"] == digest
    assert from_pairs(lm, pairs, data=digest, layer=0).provenance["method"] == "paired PCA"
    with pytest.raises(BadInput, match="layer 2 is out of range"):
        from_pairs(lm, pairs, data=digest, layer=2)


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"positive": "a"}', ":1: negative: must be a text that is not empty"),
        ('{"positive": "", "negative": "b"}', ":1: positive: must be a text"),
        ('{"positive": "a", "negative": "a"}', ":1: both texts are the same"),
        ("a, b", ":1: "),
        ("", "has no pairs|is empty"),
    ],
)
def test_pairs_that_cannot_be_read(line, message, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(BadInput, match=message):
        read_pairs(tmp_path / "pairs.jsonl")


def test_texts_that_cannot_be_read():
    for texts, message in (([[1], []], "text 1: has 0 tokens; give 1 to 4"), ([[1] * 5], "text 0: has 5 tokens")):
        with pytest.raises(BadInput, match=message):
            families(texts, 4)
