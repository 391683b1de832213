"""Logits of a Hugging Face folder by transformers in torch, float32: TOKENS.npy [B, T] -> LOGITS.npy [B, T, V].

python torch_logits.py --model smollm2-135m --tokens tokens.npy --out logits.npy
"""

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()

    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.no_grad():
        np.save(args.out, model(input_ids=torch.from_numpy(np.load(args.tokens)).long()).logits.numpy())


if __name__ == "__main__":
    main()
