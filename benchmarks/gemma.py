"""Gemma 3 270M from the catalogue against transformers and sentencepiece, and the memory that loading it takes.

    python benchmarks/gemma.py --torch .venv-torch/bin/python      # an environment with sentencepiece and protobuf too

Weights: transformers dequantises the same GGUF file in torch. Tokens: the sentencepiece library reads the same pieces.
Memory: the largest anonymous resident memory while the weights are read, less what the devices hold by then.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from scipy.special import logsumexp

from aif.corpus import bundled, read
from aif.corpus.pretraining import texts
from aif.models import gguf
from aif.models.catalogue import fetch
from aif.models.hub import LM, load
from aif.models.names import gguf_names
from aif.models.weights import assemble, whole

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
    """Peak while the weights are read onto the device, leaf by leaf."""
    path = fetch(NAME)
    header = gguf.read_header(path)
    config = gguf.gguf_config(header, path)
    resident = lambda: int(next(x for x in open("/proc/self/status") if "RssAnon" in x).split()[1]) << 10  # noqa: E731
    seen, held, done = [0], [0], threading.Event()

    def keep(path, shape, build):
        leaf = whole(path, shape, build)
        held[0] += leaf.nbytes
        return jax.device_put(leaf).block_until_ready()

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], resident() - before - held[0])
            time.sleep(0.003)

    jax.devices()
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        params = assemble(config, gguf_names(config), gguf._stored(config, header, data, path), NAME, keep)
    done.set()
    watcher.join()
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    print(f"device copy {held[0] >> 20} MiB, largest array {largest >> 20} MiB, host above it {seen[0] >> 20} MiB")


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
