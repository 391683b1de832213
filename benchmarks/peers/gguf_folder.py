"""A Hugging Face folder (weights and config only) of a GGUF file, dequantised by transformers itself.

python gguf_folder.py --gguf gemma-3-270m-q4_k_m.gguf --out folder
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--gguf", "--out"):
        parser.add_argument(name, type=Path, required=True)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(args.gguf.resolve().parent),
        gguf_file=args.gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
