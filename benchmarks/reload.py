"""What aif exports, loaded by transformers and PEFT in torch: largest difference of a logit.

    python benchmarks/reload.py --torch .venv-torch/bin/python                 # small random models of every family
    python benchmarks/reload.py --torch .venv-torch/bin/python --real smollm2-135m

Each model gets a random adapter on every linear layer, is exported merged, in shards, and as a PEFT folder (whose base
is the model exported without the adapter), and both are loaded in torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aif.adapter import lora
from aif.errors import BadInput
from aif.export import export_merged, export_peft
from aif.models.hub import LM, byte_tokenizer, load
from aif.models.weights import read_folder

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ROOT / "tests" / "golden" / "families"
PEERS = ROOT / "benchmarks" / "peers"


def small(name: str) -> LM:
    config, params = read_folder(FAMILIES / name)
    return LM(config, jax.tree.map(jnp.asarray, params), byte_tokenizer(), name, name)


def reloaded(torch: Path, lm: LM, place: Path) -> dict[str, float]:
    """Differences of the merged folder and, where PEFT has a place for the adapter, of the PEFT folder."""
    key = jax.random.key(0)
    adapter = lora(lm.config, rank=4, alpha=8.0, key=key)
    for number, target in enumerate(adapter.values()):
        target["b"] = 0.02 * jax.random.normal(jax.random.fold_in(key, number), target["b"].shape)
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab, (2, 24))
    np.save(place / "tokens.npy", tokens)
    ours = np.asarray(lm.logits(jnp.asarray(tokens), adapter=adapter))
    export_merged(lm, None, place / "base")
    size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    export_merged(lm, adapter, place / "merged", max_shard=size // 3)
    runs = {"merged": ["torch_logits.py", "--model", place / "merged"]}
    try:
        export_peft(lm, adapter, place / "peft")
        runs["peft"] = ["peft_logits.py", "--model", place / "base", "--adapter", place / "peft"]
    except BadInput:
        pass  # adapters of experts
    found = {"largest logit": float(np.abs(ours).max())}
    found["effect"] = float(np.abs(ours - np.asarray(lm.logits(jnp.asarray(tokens)))).max())
    for name, (script, *arguments) in runs.items():
        files = ["--tokens", place / "tokens.npy", "--out", place / "logits.npy"]
        subprocess.run([torch, PEERS / script, *arguments, *files], check=True)
        found[name] = float(np.abs(np.load(place / "logits.npy") - ours).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="interpreter with peers/requirements.txt")
    parser.add_argument("--real", help="a real model instead of the small ones")
    args = parser.parse_args()
    torch = Path(os.path.abspath(args.torch))
    names = [args.real] if args.real else sorted(path.stem for path in FAMILIES.glob("*.npz"))
    for name in names:
        lm = load(name) if args.real else small(name)
        lm = replace(lm, source=name)
        with tempfile.TemporaryDirectory() as place:
            found = reloaded(torch, lm, Path(place))
        print(name, ", ".join(f"{key} {value:.1e}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
