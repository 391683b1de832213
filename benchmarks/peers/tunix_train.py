"""Time Tunix's trainers on the same work: a LoRA adapter on every linear layer, float32, on the CPU.

    pip install -r requirements-tunix.txt     # an environment of its own
    python tunix_train.py --objective sft --model smollm2-135m --data rows.jsonl --steps 3

Data and work are those of trl_train.py, except that Tunix's DPO holds a second copy of the weights as the reference
and asks it at every step. Rows are padded to the longest of the file. Tunix's Llama ignores the model's rope_theta and
is told it here.

Prints one JSON line; the first two steps, which compile, are not timed. Tokens are those of a step, padding left out.
"""

import argparse
import functools
import json
import os
import resource
import time
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoTokenizer
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft import hooks, peft_trainer, utils

LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
SAMPLES = 4
STEPS = {"eval_every_n_steps": 10**9, "max_inflight_computations": 1}


def load(folder: str):
    """SmolLM2 as Tunix's Llama, from the folder's config."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        c = json.load(file)
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    rope = getattr(llama.apply_rope, "func", llama.apply_rope)
    llama.apply_rope = functools.partial(rope, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=theta,
        weight_tying=True,
    )
    return llama_params.create_model_from_safe_tensors(folder, config, mesh=None, dtype=jax.numpy.float32)


def with_lora(model):
    provider = qwix.LoraProvider(module_path=LINEAR, rank=16, alpha=32.0)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def padded(ids: list[list[int]], width: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and their mask, padded on one side."""
    tokens, mask = np.zeros((2, len(ids), width), np.int32)
    for row, x in enumerate(ids):
        at = slice(width - len(x), width) if left else slice(0, len(x))
        tokens[row, at], mask[row, at] = x, 1
    return tokens, mask


class Watch(hooks.TrainingHooks):
    """The losses of a trainer's steps, and when each began: after the one before had ended and its own samples were
    drawn."""

    def __init__(self):
        self.stamps, self.losses = [], []

    def on_train_step_start(self, trainer):
        self.stamps.append(time.perf_counter())

    def on_train_step_end(self, trainer, step, loss):
        self.losses.append(float(loss))

    def nothing(self, *_):
        """What else a trainer tells."""

    on_train_start = on_train_end = on_eval_step_start = on_eval_step_end = nothing


def sft(model, ids: dict, steps: int, watch: Watch) -> int:
    rows = [p + c for p, c in zip(ids["prompt"], ids["chosen"], strict=True)]
    tokens, present = padded(rows, max(map(len, rows)))
    scored = present.copy()  # Tunix scores where its input mask is set; attention is told apart
    for row, prompt in enumerate(ids["prompt"]):
        scored[row, : len(prompt)] = 0

    def inputs(x):
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(present.astype(bool)),
            "attention_mask": utils.make_causal_attn_mask(present.astype(bool)),
        }

    config = peft_trainer.TrainingConfig(max_steps=steps, **STEPS)
    trainer = peft_trainer.PeftTrainer(with_lora(model), optax.adamw(1e-4), config).with_gen_model_input_fn(inputs)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=scored.astype(bool))
    trainer.with_training_hooks(watch)
    trainer.train([batch] * steps)
    return int(present.sum())


def dpo(model, ids: dict, steps: int, watch: Watch, folder: str) -> int:
    from tunix.sft.dpo import dpo_trainer

    parts, answers = {}, max(map(len, ids["chosen"] + ids["rejected"]))
    for name in ("prompt", "chosen", "rejected"):
        asks = name == "prompt"
        width = max(map(len, ids[name])) if asks else answers
        parts[f"{name}_ids"], parts[f"{name}_mask"] = padded(ids[name], width, left=asks)
    config = dpo_trainer.DPOTrainingConfig(max_steps=steps, beta=0.1, **STEPS)
    trainer = dpo_trainer.DPOTrainer(with_lora(load(folder)), model, optax.adamw(1e-4), config)
    trainer.with_training_hooks(watch)
    trainer.train([dpo_trainer.TrainingInput(**parts)] * steps)
    return sum(int(parts[f"{name}_mask"].sum()) for name in ("prompt", "prompt", "chosen", "rejected"))


def grpo(model, ids: dict, steps: int, watch: Watch, tokenizer, text: list[str], new_tokens: int) -> int:
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    role, longest = rl_cluster.Role, max(map(len, ids["prompt"]))
    training = {"actor_optimizer": optax.adamw(1e-4), "max_steps": steps, "mini_batch_size": 1, **STEPS}
    sampling = {"temperature": 1.0, "top_p": 1.0, "eos_tokens": [len(tokenizer) - 1]}  # a token that is never drawn
    reward = lambda prompts, completions, **_: [float(len(set(c.split()))) for c in completions]  # noqa: E731
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=with_lora(model),
            reference=model,
            tokenizer=tokenizer,
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
                rollout_engine="vanilla",
                training_config=rl_cluster.RLTrainingConfig(train_micro_batch_size=1, **training),
                rollout_config=base_rollout.RolloutConfig(
                    max_tokens_to_generate=new_tokens,
                    max_prompt_length=longest,
                    kv_cache_size=longest + new_tokens,
                    **sampling,
                ),
            ),
        )
        cluster.actor_trainer.with_training_hooks(watch)
        config = grpo_learner.GRPOConfig(num_generations=SAMPLES, num_iterations=1, beta=0.04)
        learner = grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
        learner.train([{"prompts": np.array(text)}] * steps)
    return SAMPLES * (longest + new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("sft", "dpo", "grpo"), required=True)
    parser.add_argument("--model", required=True, help="a Hugging Face folder (make_hf_folder.py)")
    parser.add_argument("--data", required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after two that compile")
    parser.add_argument("--tokens", type=int, default=64, help="of a sample")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ids = {k: [tokenizer.encode(r[k]) for r in rows] for k in ("prompt", "chosen", "rejected")}
    model, watch, steps = load(args.model), Watch(), args.steps + 3  # timed from the third start on, to the next start
    if args.objective == "sft":
        tokens = sft(model, ids, steps, watch)
    elif args.objective == "dpo":
        tokens = dpo(model, ids, steps, watch, args.model)
    else:
        tokens = grpo(model, ids, steps, watch, tokenizer, [r["prompt"] for r in rows], args.tokens)
    seconds = [b - a for a, b in zip(watch.stamps, watch.stamps[1:], strict=False)][2:]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    versions = {name: version(name) for name in ("jax", "google-tunix", "qwix")}
    found = {"seconds": seconds, "losses": watch.losses, "tokens": tokens}
    print(json.dumps({**found, "peak_mb": memory, "versions": versions}))


if __name__ == "__main__":
    main()
