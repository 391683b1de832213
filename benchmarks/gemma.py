"""Gemma 3 270M from the catalogue against transformers and sentencepiece, and the memory that loading it takes.

    python benchmarks/gemma.py --torch .venv-torch/bin/python      # an environment with sentencepiece and protobuf too

Weights: transformers dequantises the same GGUF file in torch. Tokens: the sentencepiece library reads the same pieces.
Memory: what Python and numpy hold at most while the weights are read; JAX's own arrays are not counted in.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from aif.corpus import bundled, read
from aif.corpus.pretraining import texts
from aif.models import gguf
from aif.models.catalogue import fetch
from aif.models.hub import LM, load
from aif.models.names import gguf_names
from aif.models.weights import assemble, placed

PEERS = Path(__file__).resolve().parent / "peers"
NAME = "gemma3-270m"
ODD = [
    "  two\n\n\nlines",
    "   three",
    "x =   5",
    "\t\ttabs \n ",
    "日本語 テスト 123",
    "🙂 👩‍👩‍👧",
    "null\x00 \x1b[0m",
    "def f(x):\n    return x",
]


def memory() -> None:
    """Peak of what Python and numpy hold while the weights are read onto the device, piece by piece."""
    path = fetch(NAME)
    header = gguf.read_header(path)
    config = gguf.gguf_config(header, path)
    tracemalloc.start()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tensors = gguf._stored(config, header, data, path)
        params = assemble(
            config, gguf_names(config), tensors, NAME, lambda *leaf: jnp.array(placed(*leaf)[0], copy=True)
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    whole, most = sum(sizes), max(sizes)
    print(f"file {path.stat().st_size >> 20} MiB, device copy {whole >> 20} MiB, largest array {most >> 20} MiB,")
    print(f"host above the device copy {peak >> 20} MiB")


def logits(torch: Path, lm: LM, place: Path) -> None:
    """4 x 64 positions of text, after the opening token."""
    ids = [
        [lm.tokenizer.bos_token_id, *lm.tokenizer.encode(t, add_special_tokens=False)[:63]]
        for t in texts("pydoc", 4, min_chars=600)
    ]
    np.save(place / "tokens.npy", np.array(ids))
    subprocess.run([torch, PEERS / "gguf_folder.py", "--gguf", fetch(NAME), "--out", place / "hf"], check=True)
    files = ["--tokens", place / "tokens.npy", "--out", place / "logits.npy"]
    subprocess.run([torch, PEERS / "torch_logits.py", "--model", place / "hf", *files], check=True)
    theirs, ours = np.load(place / "logits.npy").astype(np.float64), np.asarray(lm.logits(np.array(ids)), np.float64)
    log_p, log_q = (x - logsumexp(x, axis=-1, keepdims=True) for x in (theirs, ours))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    print(f"largest difference of a logit {np.abs(theirs - ours).max():.1e}, mean KL {kl.mean():.1e} nats,")
    print(f"likeliest token the same at {(theirs.argmax(-1) == ours.argmax(-1)).mean():.0%} of {kl.size} positions")


def tokens(torch: Path, lm: LM, place: Path) -> None:
    """Odd texts, documentation, Spanish and multi-turn chats."""
    own = {key.rsplit(".", 1)[-1]: value for key, value in gguf.read_header(fetch(NAME)).fields.items()}
    pieces = {"tokens": own["tokens"], "scores": own["scores"], "kinds": own["token_type"]}
    (place / "pieces.json").write_text(json.dumps(pieces))
    rows = read(bundled("discernment-es")).rows[:5] + read(bundled("discernment-multi")).rows[:10]
    chats = [x.content for row in rows for x in (*row.prompt, *row.candidates)]
    probes = ODD + texts("pydoc", 30, min_chars=400) + chats
    (place / "texts.json").write_text(json.dumps(probes))
    files = ["--pieces", place / "pieces.json", "--texts", place / "texts.json", "--out", place / "ids.json"]
    subprocess.run([torch, PEERS / "sentencepiece_ids.py", *files], check=True)
    theirs = json.loads((place / "ids.json").read_text())
    ours = [lm.tokenizer.encode(text, add_special_tokens=False) for text in probes]
    differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
    print(f"{differ} of {len(probes)} texts have other ids than sentencepiece's, of {sum(map(len, theirs))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="interpreter with torch, transformers, sentencepiece")
    torch = Path(os.path.abspath(parser.parse_args().torch))
    memory()
    lm = load(NAME)
    with tempfile.TemporaryDirectory() as place:
        tokens(torch, lm, Path(place))
        logits(torch, lm, Path(place))


if __name__ == "__main__":
    main()
