"""Time TRL's SFTTrainer: a LoRA adapter on every linear layer, float32, loss on the last assistant turn only.

    pip install torch transformers trl peft datasets accelerate safetensors     # an environment of its own
    python trl_sft.py --model smollm2-135m --data rows.jsonl --max-length 512 --max-steps 8

Each row of the data is {"messages": [...]} and must end with an assistant's turn. TRL's assistant-only loss refuses a
chat template without generation markers, which is what SmolLM2's is, so a row becomes a prompt (all turns but the
last) and a completion (the last): TRL then trains on the completion alone. In that template the newline after the
closing <|im_end|> is part of the completion.

Prints one JSON line. Useful tokens are the ones that are not padding, response tokens the ones in the loss; both are
counted in the batches the steps really took. `useful_tokens_per_second` divides by the whole of `train()`,
`useful_tokens_per_second_warm` leaves the first step and the set-up out.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def read_rows(path: str) -> list[dict]:
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            messages = json.loads(line)["messages"]
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise SystemExit(f"{path}:{number}: a row needs a prompt and, last, an assistant's turn")
            turns = [{"role": m["role"], "content": m["content"]} for m in messages]
            rows.append({"prompt": turns[:-1], "completion": turns[-1:]})
    if not rows:
        raise SystemExit(f"{path} has no rows")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder (make_hf_folder.py)")
    parser.add_argument("--data", required=True, help="JSONL of chat rows")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="TRL's own default; off here")
    args = parser.parse_args()
    if args.max_steps < 1:
        parser.error("--max-steps must be at least 1")
    rows = read_rows(args.data)

    import datasets
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    class CountingTrainer(trl.SFTTrainer):
        """Counts the tokens of each batch as it is trained on, and times the step."""

        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.counts, self.starts, self.losses = [], [], []

        def training_step(self, model, inputs, *a, **k):
            self.starts.append(time.perf_counter())
            useful, positions = int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel()
            self.counts.append((useful, int((inputs["labels"] != -100).sum()), positions))
            loss = super().training_step(model, inputs, *a, **k)
            self.losses.append(float(loss))
            return loss

    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        config = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            max_steps=args.max_steps,
            max_length=args.max_length,
            completion_only_loss=True,
            packing=False,
            learning_rate=args.lr,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=args.gradient_checkpointing,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=args.seed,
        )
        trainer = CountingTrainer(
            model=model,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)  # it prints every log to standard output
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        dtypes = sorted({str(p.dtype) for p in trainer.model.parameters()})
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        end = time.perf_counter()
        used = (time.process_time() - cpu) / (end - start)
    useful, response, positions = (sum(c[i] for c in trainer.counts) for i in range(3))
    # A step lasts until the next one starts, so the optimizer and the logs are inside
    edges = trainer.starts + [end]
    steps = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    warm = None
    if len(steps) > 1:
        warm = round((useful - trainer.counts[0][0]) / sum(steps[1:]), 1)
    print(
        json.dumps(
            {
                "bench": "trl_sft",
                "useful_tokens_per_second": round(useful / (end - start), 1),
                "useful_tokens_per_second_warm": warm,
                "useful_tokens": useful,
                "response_tokens": response,
                "padded_tokens": positions,
                "train_seconds": round(end - start, 3),
                "step_seconds": round(statistics.median(steps[1:] or steps), 4),
                # 2 threads on a quiet machine come close to 2; much less means something else was running
                "cpu_used": round(used, 2),
                # ru_maxrss is in KiB on Linux
                "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
                "losses": [round(x, 4) for x in trainer.losses],
                "batch": args.batch,
                "max_length": args.max_length,
                "steps": len(steps),
                "rows": len(rows),
                "trainable_parameters": sum(p.numel() for p in trained),
                "parameter_dtypes": dtypes,
                "gradient_checkpointing": args.gradient_checkpointing,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "trl": trl.__version__,
                "peft": peft.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
