"""A GGUF control vector as repeng reads and applies it.

    python control_vector.py --model smollm2-135m --vector v.gguf --tokens tokens.npy --out out.npz

Runs in an environment of its own (repeng 0.4, numpy < 2, torch, transformers). Writes every `direction.N` that repeng
finds, and the logits of the tokens with the vector added at strength 1, float32.
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--vector", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()

    import numpy as np
    import torch
    import transformers
    from repeng import ControlModel, ControlVector

    vector = ControlVector.import_gguf(args.vector)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    controlled = ControlModel(model, sorted(vector.directions))
    controlled.set_control(vector, 1.0)
    rows = torch.from_numpy(np.load(args.tokens)).long()
    with torch.no_grad():  # a row at a time: repeng 0.4 mistakes the shape of position ids for larger batches
        logits = np.concatenate([controlled(input_ids=row[None]).logits.numpy() for row in rows])
    found = {f"direction.{n}": np.array(v) for n, v in vector.directions.items()}
    np.savez(args.out, logits=logits, model_type=vector.model_type, **found)


if __name__ == "__main__":
    main()
