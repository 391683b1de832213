"""Time a plain torch train step: a peft LoRA adapter on every linear layer (or `--full`), eager (or `--compile`).

AdamW, float32, random tokens.

    pip install torch transformers peft accelerate safetensors     # an environment of its own
    python torch_step.py --model smollm2-135m --batch 4 --length 256 --steps 8

Prints one JSON line. The first step warms up and is not in the medians; `losses` starts with it.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder (make_hf_folder.py)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after one that warms up")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="train every weight, without an adapter")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")

    import peft
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    if not args.full:
        lora = peft.LoraConfig(
            r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, lora)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    if args.compile:
        model = torch.compile(model, dynamic=False)
    # One batch, seen at every step, so that the losses must fall
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.length))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    losses, seconds = [step()], []
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(args.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    used = (time.process_time() - cpu) / (time.perf_counter() - began)
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "bench": "torch_step",
                "tokens_per_second": round(args.batch * args.length / median, 1),
                "step_seconds": round(median, 4),
                "step_seconds_min": round(min(seconds), 4),
                # 2 threads on a quiet machine come close to 2; much less means something else was running
                "cpu_used": round(used, 2),
                # ru_maxrss is in KiB on Linux
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "losses": [round(x, 4) for x in losses],
                "batch": args.batch,
                "length": args.length,
                "steps": args.steps,
                "trainable_parameters": sum(p.numel() for p in trained),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
