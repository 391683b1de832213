"""The three basin metrics of one LoRA solution as a plain torch loop: transformers, peft, float32.

    python torch_basins.py --model smollm2-135m --problem problem.npz --noise-seeds 1 --eps 0.3 1.0 --factors 1.0

`problem.npz` (made by benchmarks/basins.py) holds token ids, response masks, text ids and the adapter's arrays. Rows
are padded to the longest of their batch; logits are made for the whole batch, as a training script would. Prints one
JSON line with seconds per pass over the rows or texts, and the losses, so that they can be compared.
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--problem", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--noise-seeds", type=int, default=1)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.5])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--texts", type=int, default=32)
    args = parser.parse_args()

    import numpy as np
    import peft
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    held = np.load(args.problem)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rank = held["q.a"].shape[-1]
    config = peft.LoraConfig(
        r=rank, lora_alpha=float(held["alpha"]), lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).eval()
    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer, target = int(name.split(".layers.")[1].split(".")[0]), name.split("_proj")[0].rsplit(".", 1)[1]
            leaf = "a" if "lora_A" in name else "b"
            parameter.data = torch.from_numpy(np.ascontiguousarray(held[f"{target}.{leaf}"][layer].T))
            weights[name] = (parameter, parameter.data.clone())

    def batches(ids: list, masks: list) -> list:
        out = []
        for k in range(0, len(ids), args.batch):
            some, which = ids[k : k + args.batch], masks[k : k + args.batch]
            width = max(len(x) for x in some)
            tokens, seen, scored = (torch.zeros(len(some), width, dtype=torch.long) for _ in range(3))
            for r, (x, m) in enumerate(zip(some, which, strict=True)):
                tokens[r, : len(x)], seen[r, : len(x)] = torch.from_numpy(x).long(), 1
                scored[r, : len(x)] = torch.from_numpy(m).long()
            out.append((tokens, seen, scored))
        return out

    split = lambda name: np.split(held[name], np.cumsum(held["lengths"])[:-1])  # noqa: E731
    rows = batches(split("tokens"), split("scored"))
    texts = np.split(held["texts"], np.cumsum(held["text_lengths"])[:-1])[: args.texts]
    texts = batches(texts, [np.r_[0, np.ones(len(t) - 1)] for t in texts])

    def loss() -> float:
        total, count = 0.0, 0
        for tokens, seen, scored in rows:
            logits = model(input_ids=tokens, attention_mask=seen).logits[:, :-1]
            labels = torch.where(scored > 0, tokens, -100)[:, 1:]
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((labels >= 0).sum())
        return total / count

    def rescale(factor: float) -> None:
        for name, (parameter, value) in weights.items():
            parameter.data.copy_(value * factor if "lora_B" in name else value)

    def perturb(eps: float, generator: torch.Generator) -> None:
        for parameter, value in weights.values():
            y = torch.randn(value.shape, generator=generator)
            y -= value * (y * value).sum() / (value * value).sum()
            y *= value.norm() / y.norm()
            parameter.data.copy_((1 - eps**2) ** 0.5 * value + eps * y)

    loss()
    seconds, cpu, found = {}, {}, {}

    def timed(name: str, passes: int, run) -> None:
        began, used = time.perf_counter(), time.process_time()
        found[name] = run()
        seconds[name] = (time.perf_counter() - began) / passes
        cpu[name] = (time.process_time() - used) / passes

    def stability() -> list:
        out = []
        for seed in range(args.noise_seeds):
            for eps in args.eps:
                perturb(eps, torch.Generator().manual_seed(seed))
                out.append(loss())
        return out

    def efficiency() -> list:
        out = []
        for factor in args.factors:
            rescale(factor)
            out.append(loss())
        return out

    def significance() -> list:
        sums, count = [0.0] * len(args.factors), 0
        for tokens, seen, scored in texts:
            with model.disable_adapter():
                log_p = model(input_ids=tokens, attention_mask=seen).logits[:, :-1].log_softmax(-1)
            keep = scored[:, 1:].float()
            count += int(keep.sum())
            for k, factor in enumerate(args.factors):
                rescale(factor)
                log_q = model(input_ids=tokens, attention_mask=seen).logits[:, :-1].log_softmax(-1)
                sums[k] += float(((log_p.exp() * (log_p - log_q)).sum(-1) * keep).sum())
        return [s / count for s in sums]

    timed("efficiency", len(args.factors), efficiency)
    timed("stability", args.noise_seeds * len(args.eps), stability)
    timed("significance", len(args.factors), significance)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "found": found, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
