"""lm-evaluation-harness on a model of ours beside its own Hugging Face model: every answer to local tasks.

    python benchmarks/harness.py --lm-eval .venv-lmeval/bin/python --folder .bench/smollm2-135m

Tasks: benchmarks/eval (multiple choice, perplexity of texts, greedy continuations). SmolLM2-135M-Instruct, float32:
plain; with a random adapter of every linear layer, which the other side loads as a PEFT folder; and steered, where the
other side is the harness's own `steered` model. The other environment holds `lm-eval[hf]`; FOLDER is the model as
transformers loads it (peers/make_hf_folder.py writes one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

import aif
from aif.adapter import lora
from aif.export import export_peft
from aif.harness import HarnessLM
from aif.steering import add

ROOT = Path(__file__).resolve().parent.parent
TASKS, PEER = ROOT / "benchmarks" / "eval", ROOT / "benchmarks" / "peers" / "harness_hf.py"
SIZE = 30.0  # of what is added at the middle layer


def numbers(answers: Any) -> tuple[list[float], list[Any]]:
    """Every log-likelihood, and everything else (whether greedy decoding agrees, texts), in order."""
    if isinstance(answers, list | tuple):
        parts = [numbers(x) for x in answers]
        return [x for part, _ in parts for x in part], [x for _, part in parts for x in part]
    return ([answers], []) if isinstance(answers, float) else ([], [answers])


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    said = []
    for task in ours:
        (mine, words), (other, their_words) = numbers(ours[task]), numbers(theirs[task])
        parts = [f"largest difference of {len(mine)} {np.abs(np.subtract(mine, other)).max():.1e} nats"] if mine else []
        alike = sum(a == b for a, b in zip(words, their_words, strict=True))
        parts += [f"{alike} of {len(words)} answers alike"] if words else []
        said.append(f"{task}: {', '.join(parts)}")
    return "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, help="interpreter with lm-eval[hf]")
    parser.add_argument("--folder", type=Path, required=True, help="the model as a Hugging Face folder")
    args = parser.parse_args()
    os.chdir(ROOT)
    lm = aif.load(str(args.folder.resolve()))
    L, D = lm.config.layers, lm.config.width
    key = jax.random.key(0)
    adapter = lora(lm.config, rank=4, alpha=8.0, key=key)
    for number, target in enumerate(adapter.values()):
        target["b"] = 0.02 * jax.random.normal(jax.random.fold_in(key, number), target["b"].shape)
    vector = jax.random.normal(key, (L, D))
    edits = add(vector, jnp.array([SIZE]), jnp.ones(L), layers=[L // 2])
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        export_peft(lm, adapter, place / "peft")
        unit = vector[L // 2] / jnp.linalg.norm(vector[L // 2])
        np.savez(place / "steer.npz", vector=unit, size=SIZE, layer=L // 2)
        ways = {"plain": ({}, []), "adapted": ({"adapter": adapter}, ["--peft", place / "peft"])}
        ways["steered"] = {"edits": edits}, ["--steer", place / "steer.npz"]
        for name, (values, options) in ways.items():
            model = HarnessLM(lm, **values)
            done: Any = lm_eval.simple_evaluate(
                model=model, tasks=manager.all_tasks, task_manager=manager, bootstrap_iters=0
            )
            ours = {task: [sample["resps"] for sample in done["samples"][task]] for task in manager.all_tasks}
            command = [os.path.abspath(args.lm_eval), PEER, "--model", args.folder, "--tasks", TASKS]
            subprocess.run([*command, "--out", place / "answers.json", *options], check=True)
            theirs = json.loads((place / "answers.json").read_text())
            scores = {f"{t} {m}": v for t, r in done["results"].items() for m, v in r.items() if m.endswith(",none")}
            print(f"{name}: {compared(json.loads(json.dumps(ours, default=float)), theirs)}", flush=True)
            print(
                "  " + ", ".join(f"{m.removesuffix(',none')} {v:.4g}" for m, v in scores.items() if "stderr" not in m)
            )


if __name__ == "__main__":
    main()
