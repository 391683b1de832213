"""Exported directions in other engines: repeng reads and applies the control vector, transformers runs the ablation.

    python benchmarks/exports.py --torch TORCH/bin/python --repeng REPENG/bin/python --folder smollm2-135m

A mean-difference direction of the bundled corpus at a middle layer of SmolLM2-135M-Instruct, in both forms, on 2 x 48
tokens of text. The environments hold peers/requirements.txt, and peers/requirements-repeng.txt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import aif
from aif.batches import build
from aif.corpus import bundled, read
from aif.corpus.pretraining import texts
from aif.directions import mean_difference, response_means
from aif.directions.exports import ablated, control_vector
from aif.directions.record import purpose
from aif.models.decoder import forward, logits
from aif.models.folder import write_folder
from aif.policy import bind
from aif.steering import add, project_out

PEERS = Path(__file__).resolve().parent / "peers"
DOSE = 0.5


def gap(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Largest difference of a logit, and mean KL of the next token in nats."""
    theirs, ours = (x.astype(np.float64) for x in (theirs, ours))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    return f"largest difference of a logit {np.abs(ours - theirs).max():.1e}, mean KL {kl:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, required=True, help="interpreter with torch and transformers")
    parser.add_argument("--repeng", type=Path, required=True, help="interpreter with repeng")
    parser.add_argument("--folder", type=Path, required=True, help="the model as a Hugging Face folder")
    args = parser.parse_args()
    torch, repeng = (os.path.abspath(p) for p in (args.torch, args.repeng))
    lm = aif.load("smollm2-135m")
    L, layer = lm.config.layers, lm.config.layers // 2
    rows = read(bundled("tiny")).rows
    data = build(rows, lm.tokenizer, which="all", length=512, target="discernment")
    seen = response_means(bind(lm), data, rows=2)
    direction = mean_difference(seen, data.tables["preference"] > 0, provenance=purpose(layer))
    tokens = np.array([lm.tokenizer.encode(t, add_special_tokens=False)[:48] for t in texts("pydoc", 2, min_chars=600)])
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        np.save(place / "tokens.npy", tokens)
        control_vector(direction, place / "v.gguf", config=lm.config, dose=DOSE)
        files = ["--tokens", place / "tokens.npy", "--out"]
        command = [repeng, PEERS / "control_vector.py", "--model", args.folder, "--vector", place / "v.gguf", *files]
        subprocess.run([*command, place / "repeng.npz"], check=True)
        theirs = np.load(place / "repeng.npz")
        unit = direction.vector[layer] / np.linalg.norm(direction.vector[layer])
        read_back = np.abs(theirs[f"direction.{layer}"] - DOSE * seen.norms[layer] * unit).max()
        steered = lm.logits(
            tokens, edits=add(direction.vector, jnp.full(2, DOSE), jnp.asarray(seen.norms), layers=[layer])
        )
        print(f"repeng reads direction.{layer} of a {theirs['model_type']} model, largest difference {read_back:.1e}")
        print(f"steered by repeng and by aif at block {layer}: {gap(np.asarray(steered), theirs['logits'])}")
        for other in (layer - 1, layer + 1):
            off = lm.logits(
                tokens,
                edits=add(
                    direction.vector[layer] * jnp.ones((L, 1)),
                    jnp.full(2, DOSE),
                    jnp.full(L, seen.norms[layer]),
                    layers=[other],
                ),
            )
            print(f"  and if block {other} were meant: {gap(np.asarray(off), theirs['logits'])}")

        vector = np.asarray(direction.vector[layer])
        config, params = ablated(lm.config, lm.params, vector)
        write_folder(place / "ablated", config, params, lm.tokenizer)
        command = [torch, PEERS / "torch_logits.py", "--model", place / "ablated", *files, place / "ablated.npy"]
        subprocess.run(command, check=True)
        out = np.load(place / "ablated.npy")
        run = lambda p, **values: np.asarray(logits(p, forward(config, p, jnp.asarray(tokens), **values).hidden))  # noqa: E731
        print(f"ablated weights in transformers and in aif: {gap(run(params), out)}")
        wide = project_out(jnp.broadcast_to(jnp.asarray(vector), direction.vector.shape), rows=1, layers=range(L))
        half = {**params, "layers": {**params["layers"], "down": lm.params["layers"]["down"]}}
        print(f"  down_proj as it was, block outputs projected instead: {gap(run(half, edits=wide), out)}")
        whole = {**lm.params, "head": lm.params["embed"]}
        print(f"  all weights as they were, block outputs projected: {gap(run(whole, edits=wide), out)}")
        print(f"  nothing ablated: {gap(run(whole), out)}")


if __name__ == "__main__":
    main()
