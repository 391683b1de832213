"""Logits of a Hugging Face folder with a PEFT adapter on it, float32: TOKENS.npy [B, T] -> LOGITS.npy [B, T, V].

python peft_logits.py --model folder --adapter folder --tokens tokens.npy --out logits.npy

It fails where PEFT warns that keys of the adapter are missing or unexpected, which by itself it does not.
"""

import argparse
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--adapter", "--tokens", "--out"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()

    import numpy as np
    import peft
    import torch
    import transformers

    warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
    base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = peft.PeftModel.from_pretrained(base, args.adapter).eval()
    with torch.no_grad():
        np.save(args.out, model(input_ids=torch.from_numpy(np.load(args.tokens)).long()).logits.numpy())


if __name__ == "__main__":
    main()
