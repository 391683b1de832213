"""The dialogue of `benchmarks/asking.py`: what its policy posterior says about asking, before anything is trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def asking():
    spec = importlib.util.spec_from_file_location("asking", ROOT / "benchmarks" / "asking.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["asking"] = module
    spec.loader.exec_module(module)
    return module


def test_belief_by_hand(asking):
    """Hints of reliability 3/4: odds 3 per hint, so 9 : 1 after two, even after one of each."""
    np.testing.assert_allclose(asking.belief(["cave", "wing"]), [0.9, 0.1])
    np.testing.assert_allclose(asking.belief(["cave", "team"]), [0.5, 0.5])


def test_only_the_epistemic_part_asks_and_only_in_doubt(asking):
    """At an even belief asking has G = 0.1 - (ln 2 - H[0.95]); helping has U = 0.5 - 0.5 = 0 when it can be right or
    wrong alike, and tells ln 2 - H[0.7] through the reaction."""
    rows = asking.conversations()
    doubt = asking.doubts(rows)
    even, sure = rows[int(np.argmax(doubt))], rows[int(np.argmin(doubt))]
    full, utility = (asking.posterior([even, sure], w) for w in (1.0, 0.0))
    told = lambda p: np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)  # noqa: E731
    weights = np.exp(8 * np.array([told(0.95) - 0.1, told(0.7), told(0.7)]))
    np.testing.assert_allclose(full[0], weights[0] / weights.sum(), rtol=1e-4)
    assert full[0] > 0.8 and full[1] < 0.05
    assert utility.max() < 0.2
