"""Greedy decoding by transformers.generate, timed: seconds for each batch size, as a JSON line.

    .venv-torch/bin/python benchmarks/peers/torch_decode.py --model FOLDER --batches 1,8,16 --prompt 32 --tokens 64

The end token is switched off, so that every row makes all its tokens. The first call of every batch size is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    seconds, processor = {}, {}
    for rows in map(int, args.batches.split(",")):
        ids = np.random.default_rng(rows).integers(100, model.config.vocab_size - 100, (rows, args.prompt))
        prompt = torch.tensor(ids)
        options = {"do_sample": False, "min_new_tokens": args.tokens, "max_new_tokens": args.tokens}
        walls, processors = [], []
        with torch.inference_mode():
            for _ in range(args.rounds + 1):
                began, used = time.perf_counter(), time.process_time()
                made = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=2, **options)
                walls.append(time.perf_counter() - began)
                processors.append(time.process_time() - used)
                assert made.shape == (rows, args.prompt + args.tokens), made.shape
        seconds[rows], processor[rows] = statistics.median(walls[1:]), statistics.median(processors[1:])
    print(json.dumps({"seconds": seconds, "processor": processor, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
