"""Answers of lm-evaluation-harness's own Hugging Face model, in torch: plain, with a PEFT adapter, or steered.

python harness_hf.py --model FOLDER --tasks FOLDER --out answers.json [--peft FOLDER | --steer steer.npz]

Writes {task: [responses of every document]}. `steer.npz` holds a `vector`, its `size` and the `layer` it is added to.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--tasks", "--out"):
        parser.add_argument(name, required=True, type=Path)
    for name in ("--peft", "--steer"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()

    import lm_eval
    import numpy as np
    import torch
    from lm_eval.tasks import TaskManager

    given = {"pretrained": str(args.model), "dtype": "float32", "device": "cpu", "batch_size": 4}
    if args.peft:
        given["peft"] = str(args.peft)
    if args.steer:
        found = np.load(args.steer)
        edit = {"steering_vector": torch.tensor(found["vector"]), "steering_coefficient": float(found["size"])}
        given["steer_path"] = str(args.steer.with_suffix(".pt"))
        torch.save({f"layers.{int(found['layer'])}": {"action": "add", **edit}}, given["steer_path"])
    manager = TaskManager(include_path=args.tasks, include_defaults=False)
    tasks = manager.all_tasks
    kind = "steered" if args.steer else "hf"
    done = lm_eval.simple_evaluate(model=kind, model_args=given, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    answers = {task: [sample["resps"] for sample in done["samples"][task]] for task in tasks}
    args.out.write_text(json.dumps(answers, default=float))


if __name__ == "__main__":
    main()
