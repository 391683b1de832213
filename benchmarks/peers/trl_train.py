"""Time TRL's SFTTrainer, DPOTrainer or GRPOTrainer: a LoRA adapter on every linear layer, float32.

    python trl_train.py --objective dpo --model smollm2-135m --data rows.jsonl --steps 3

Each row of the data is {"prompt": text, "chosen": text, "rejected": text}, the prompt already in the chat template.
Every step takes all rows: `sft` trains on the chosen answers, `dpo` on the pairs, with the reference asked beforehand,
and `grpo` samples four answers of exactly `--tokens` tokens to the only prompt, rewards distinct words and makes one
update.

Prints one JSON line; the first step warms up and is not timed. Tokens are those of a step that are not padding.
"""

import argparse
import json
import os
import resource
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SAMPLES = 4


def distinct_words(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def trainer_of(args, rows, folder, common):
    """The trainer, whose every step takes all rows."""
    import datasets
    import trl

    plain = {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if args.objective == "sft":
        config = trl.SFTConfig(per_device_train_batch_size=len(rows), max_length=512, **plain)
        data = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
        return trl.SFTTrainer(args=config, train_dataset=datasets.Dataset.from_list(data), **common)
    if args.objective == "dpo":
        kept = {"beta": 0.1, "precompute_ref_log_probs": True}
        config = trl.DPOConfig(per_device_train_batch_size=len(rows), max_length=512, **kept, **plain)
        return trl.DPOTrainer(args=config, train_dataset=datasets.Dataset.from_list(rows), **common)
    config = trl.GRPOConfig(
        per_device_train_batch_size=SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        beta=0.04,
        **plain,
    )
    data = datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in rows])
    return trl.GRPOTrainer(args=config, reward_funcs=distinct_words, train_dataset=data, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("sft", "dpo", "grpo"), required=True)
    parser.add_argument("--model", required=True, help="a Hugging Face folder (make_hf_folder.py)")
    parser.add_argument("--data", required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that warms up")
    parser.add_argument("--tokens", type=int, default=64, help="of a sample")
    args = parser.parse_args()

    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(2)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    stamps = []

    class Stamps(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    common = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        "processing_class": tokenizer,
        "peft_config": peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, rows, folder, common)
        trainer.remove_callback(transformers.PrinterCallback)  # it prints every log to standard output
        trainer.add_callback(Stamps())
        trainer.train()
    stamps.append(time.perf_counter())
    # A step lasts until the next one starts, so collating, sampling, the optimizer and the logs are inside
    seconds = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][1:]
    logs = [h for h in trainer.state.log_history if "loss" in h]
    found = {"seconds": seconds, "losses": [h["loss"] for h in logs], "tokens": int(logs[0]["num_tokens"])}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, trl)}
    print(json.dumps({**found, "peak_mb": memory, "versions": versions}))


if __name__ == "__main__":
    main()
