"""Agreement with torch, made afresh: golden files again, the tests that read them, and full logits of the real model.

    make parity
    python benchmarks/parity.py --torch .venv-torch/bin/python

The golden folder is copied, its scripts are run there by the torch environment, and the tests run on the copy. Then the
whole logits of SmolLM2-135M-Instruct on text are compared with transformers'.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2-135m"
TESTS = ("test_parity.py", "test_real_model.py", "test_trl.py")


def remade(torch: Path, folder: Path, place: Path) -> None:
    """The golden files made again in a copy of the tests, and the tests that read them run there."""
    shutil.copytree(ROOT / "tests", place / "tests")
    golden = place / "tests" / "golden"
    subprocess.run([torch, golden / "make_logits.py", "--real", folder], check=True)
    subprocess.run([torch, golden / "make_losses.py"], check=True)
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", place]
    subprocess.run([*command, *(place / "tests" / name for name in TESTS)], check=True)


def whole_logits(torch: Path, folder: Path, place: Path) -> None:
    """Largest difference, mean KL, and agreement of the likeliest token, over 4 x 64 positions of text."""
    import aif
    from aif.corpus.pretraining import texts

    lm = aif.load(MODEL)
    ids = [lm.tokenizer.encode(t, add_special_tokens=False)[:64] for t in texts("pydoc", 4, min_chars=600)]
    np.save(place / "tokens.npy", np.array(ids))
    script = ROOT / "benchmarks" / "peers" / "torch_logits.py"
    files = ["--tokens", place / "tokens.npy", "--out", place / "logits.npy"]
    subprocess.run([torch, script, "--model", folder, *files], check=True)
    theirs, ours = np.load(place / "logits.npy").astype(np.float64), np.asarray(lm.logits(np.array(ids)), np.float64)
    log_p, log_q = (x - logsumexp(x, axis=-1, keepdims=True) for x in (theirs, ours))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    print(f"{MODEL}: largest difference of a logit {np.abs(theirs - ours).max():.1e}, mean KL {kl.mean():.1e} nats,")
    print(f"likeliest token the same at {(theirs.argmax(-1) == ours.argmax(-1)).mean():.0%} of {kl.size} positions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="interpreter with peers/requirements.txt")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / MODEL, help="where torch's weights go")
    args = parser.parse_args()
    torch = Path(os.path.abspath(args.torch))  # a venv's interpreter is a link that must not be followed
    if not args.folder.exists():
        from aif.models.hub import fetch

        make = ROOT / "benchmarks" / "peers" / "make_hf_folder.py"
        subprocess.run([torch, make, "--gguf", fetch(MODEL), "--out", args.folder], check=True)
    with tempfile.TemporaryDirectory() as temporary:
        whole_logits(torch, args.folder.resolve(), Path(temporary))
        remade(torch, args.folder.resolve(), Path(temporary))


if __name__ == "__main__":
    main()
