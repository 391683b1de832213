"""Write the golden losses (trl_dpo.npz, trl_reward.npz, trl_grpo.npz), computed by TRL's own trainers.

    pip install torch transformers trl peft datasets    # an environment of its own, not the engine's
    python make_losses.py                               # needs tiny_llama/, which make_logits.py writes

TRL's losses live inside methods of its trainers, between the model's forward passes and the metrics, so stand-ins take
the place of the models and return chosen numbers as log-probabilities or rewards; every line from there to the loss is
TRL's. Losses of pairs are asked for one pair at a time, so that TRL's batch mean is that pair's loss.

trl_dpo.npz: policy_chosen, policy_rejected, ref_chosen, ref_rejected [16] float32, tokens_chosen, tokens_rejected [16],
and for beta 0.1 and 1.0 (`b0.1`, `b1.0`) the losses [16] and their gradients by the two policy log-probabilities,
`loss__X` and `grad_chosen__X`, `grad_rejected__X`, where X is
    sigmoid_b0.1            loss_type "sigmoid", no label smoothing
    sigmoid_b0.1_ls0.1      the same with label_smoothing 0.1, which TRL's "sigmoid" does not read: equal to the first
    cdpo_b0.1_ls0.1         conservative DPO, (1 - e) * L(z) + e * L(-z): loss_type "aot", whose sorting does nothing
                            to a batch of one pair
    robust_b0.1_ls0.1       loss_type "robust", ((1 - e) * L(z) - e * L(-z)) / (1 - 2e)
    hinge_b0.1, ipo_b0.1    these loss types; "ipo" divides log-ratios by the tokens of their response
    free_F_b0.1[_ls0.1]     CPOTrainer.cpo_loss, which has no reference; F is sigmoid (with and without smoothing),
                            hinge or ipo (of whole responses)
trl_reward.npz: chosen, rejected, margin [16] and `loss__X`, `grad_chosen__X`, `grad_rejected__X` of RewardTrainer;
X is plain, margin, or centre (center_rewards_coefficient 0.01, with the margin).
trl_grpo.npz: 3 prompts of 4 samples of up to 6 tokens: logps, old_logps, ref_logps, mask [12, 6], rewards [12], of
which the last four are equal; sample 5 has no tokens. advantages__group and advantages__none [12] (scale_rewards), and
from the first of these `loss__L_X` and `grad__L_X` [12, 6]; L is the loss type grpo, bnpo or dr_grpo, X is b0.0 or
b0.04 (beta), or b0.04_corrected (use_bias_correction_kl too); epsilon is 0.2 and epsilon_high 0.28.
"""

import logging
import os
import platform
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer

HERE = Path(__file__).resolve().parent
PAIRS, PROMPTS, SAMPLES, TOKENS = 16, 3, 4, 6
SMOOTHING = 0.1
# name in the npz -> (loss_type, label_smoothing)
SETTINGS = {
    "sigmoid_b{}": ("sigmoid", 0.0),
    "sigmoid_b{}_ls0.1": ("sigmoid", SMOOTHING),
    "cdpo_b{}_ls0.1": ("aot", SMOOTHING),
    "robust_b{}_ls0.1": ("robust", SMOOTHING),
    "hinge_b{}": ("hinge", 0.0),
    "ipo_b{}": ("ipo", 0.0),
}
FREE = {
    "free_sigmoid_b{}": ("sigmoid", 0.0),
    "free_sigmoid_b{}_ls0.1": ("sigmoid", SMOOTHING),
    "free_hinge_b{}": ("hinge", 0.0),
    "free_ipo_b{}": ("ipo", 0.0),
}


class StandIn(torch.nn.Module):
    """Returns the given log-probabilities the way TRL's fused head does: the first completion token carries them."""

    def __init__(self):
        super().__init__()
        self.log_probs = None

    def forward(self, input_ids, **_):
        short = input_ids.shape[1] - 1 - self.log_probs.shape[1]
        log_probs = torch.nn.functional.pad(self.log_probs, (0, short))
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            label_mask=torch.ones_like(zeros).bool(),
        )


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "ask", "good", "bad"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(HERE / "tiny_llama", dtype=torch.float32)


PLAIN = {"bf16": False, "use_cpu": True, "report_to": [], "gradient_checkpointing": False}


def dpo_trainer(folder: str, loss_type: str, beta: float, smoothing: float) -> DPOTrainer:
    config = DPOConfig(output_dir=folder, beta=beta, loss_type=[loss_type], label_smoothing=smoothing, **PLAIN)
    rows = Dataset.from_list([{"prompt": "ask", "chosen": "good", "rejected": "bad"}])
    trainer = DPOTrainer(model=tiny_model(), args=config, train_dataset=rows, processing_class=word_tokenizer())
    assert (trainer.beta, trainer.label_smoothing, trainer.loss_types) == (beta, smoothing, [loss_type])
    return trainer


def pair_losses(trainer: DPOTrainer, pairs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    policy = StandIn()
    trainer.ref_model = StandIn()

    def loss(i: int, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        # A row each for chosen and rejected: a prompt token, then as many completion tokens as the response has
        lengths = [int(pairs[f"tokens_{side}"][i]) for side in ("chosen", "rejected")]
        mask = torch.tensor([[0] + [1] * n + [0] * (max(lengths) - n) for n in lengths])
        inputs = {
            "input_ids": torch.full_like(mask, 4),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
        }
        policy.log_probs = torch.stack([chosen, rejected])[:, None]
        trainer.ref_model.log_probs = torch.tensor([[pairs["ref_chosen"][i]], [pairs["ref_rejected"][i]]])
        return trainer.compute_loss(policy, inputs)

    return by_pair(loss, pairs["policy_chosen"], pairs["policy_rejected"])


def by_pair(loss, chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, ...]:
    """(losses, gradients by the chosen and by the rejected number) of `loss(i, chosen, rejected)`."""
    found = []
    for i in range(PAIRS):
        ends = [torch.tensor(x[i], requires_grad=True) for x in (chosen, rejected)]
        value = loss(i, *ends)
        value.backward()
        found.append((value.item(), ends[0].grad.item(), ends[1].grad.item()))
    return tuple(np.float32(column) for column in zip(*found, strict=True))


def free_losses(loss_type: str, beta: float, smoothing: float, pairs: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    me = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), beta=beta, label_smoothing=smoothing, loss_type=loss_type
    )
    loss = lambda i, chosen, rejected: CPOTrainer.cpo_loss(me, chosen[None], rejected[None])[0][0]  # noqa: E731
    return by_pair(loss, pairs["policy_chosen"], pairs["policy_rejected"])


def dpo(rng: np.random.Generator, folder: str) -> dict[str, np.ndarray]:
    ref_chosen = -rng.uniform(5, 120, PAIRS)
    ref_rejected = -rng.uniform(5, 120, PAIRS)
    # Mostly small moves from the reference, and two large ones either way, where the sigmoid saturates
    move = rng.normal(0, 4, (2, PAIRS))
    move[:, 0] = [40, -40]
    move[:, 1] = [-40, 40]
    pairs = {
        "policy_chosen": np.float32(ref_chosen + move[0]),
        "policy_rejected": np.float32(ref_rejected + move[1]),
        "ref_chosen": np.float32(ref_chosen),
        "ref_rejected": np.float32(ref_rejected),
        "tokens_chosen": rng.integers(1, 9, PAIRS),
        "tokens_rejected": rng.integers(1, 9, PAIRS),
    }
    out = dict(pairs)
    for beta in (0.1, 1.0):
        for name, (loss_type, smoothing) in SETTINGS.items():
            put(out, name.format(beta), pair_losses(dpo_trainer(folder, loss_type, beta, smoothing), pairs))
        for name, (loss_type, smoothing) in FREE.items():
            put(out, name.format(beta), free_losses(loss_type, beta, smoothing, pairs))
    return out


def put(out: dict[str, np.ndarray], name: str, found: tuple[np.ndarray, ...]) -> None:
    out[f"loss__{name}"], out[f"grad_chosen__{name}"], out[f"grad_rejected__{name}"] = found
    print(f"{name}: mean {found[0].mean():.6f} min {found[0].min():.6f} max {found[0].max():.6f}")


def reward(rng: np.random.Generator) -> dict[str, np.ndarray]:
    out = {name: np.float32(rng.normal(0, 3, PAIRS)) for name in ("chosen", "rejected")}
    out["chosen"][:2], out["rejected"][:2] = [30, -30], [-30, 30]
    out["margin"] = np.float32(rng.uniform(0, 2, PAIRS))
    for name, margin, centre in (("plain", False, None), ("margin", True, None), ("centre", True, 0.01)):
        same = lambda x: x  # noqa: E731
        me = SimpleNamespace(
            model=SimpleNamespace(training=True),
            args=SimpleNamespace(center_rewards_coefficient=centre),
            accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
            _total_train_tokens=0,
            _tp_size=1,
            _metrics=defaultdict(lambda: defaultdict(list)),
        )

        def loss(i, chosen, rejected, me=me, margin=margin):
            inputs = {"attention_mask": torch.ones(2, 1, dtype=torch.long)}
            if margin:
                inputs["margin"] = torch.tensor([out["margin"][i]])
            model = lambda **_: SimpleNamespace(logits=torch.stack([chosen, rejected])[:, None])  # noqa: E731
            return RewardTrainer.compute_loss(me, model, inputs)

        put(out, name, by_pair(loss, out["chosen"], out["rejected"]))
    return out


def grpo_trainer(folder: str, rewards: np.ndarray, **options) -> GRPOTrainer:
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        epsilon=0.2,
        epsilon_high=0.28,
        **options,
        **PLAIN,
    )
    rows = Dataset.from_list([{"prompt": "ask"}] * PROMPTS)
    given = lambda completions, **_: rewards.tolist()  # noqa: E731
    trainer = GRPOTrainer(tiny_model(), given, args=config, train_dataset=rows, processing_class=word_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def grpo(rng: np.random.Generator, folder: str) -> dict[str, np.ndarray]:
    n = PROMPTS * SAMPLES
    rewards = np.float32(rng.normal(0, 2, n))
    rewards[-SAMPLES:] = 0.7
    lengths = rng.integers(1, TOKENS + 1, n)
    lengths[5] = 0
    out = {"rewards": rewards, "mask": np.int32(np.arange(TOKENS) < lengths[:, None])}
    out["logps"] = np.float32(-rng.uniform(0.1, 6, (n, TOKENS)))
    out["old_logps"] = out["logps"] + np.float32(rng.normal(0, 0.3, (n, TOKENS)))
    out["ref_logps"] = out["logps"] + np.float32(rng.normal(0, 0.5, (n, TOKENS)))
    for scale in ("group", "none"):
        trainer = grpo_trainer(folder, rewards, scale_rewards=scale)
        made = trainer._generate_and_score_completions([{"prompt": "ask"}] * n)
        out[f"advantages__{scale}"] = made["advantages"].numpy()
    for loss_type in ("grpo", "bnpo", "dr_grpo"):
        for name, beta, corrected in (("b0.0", 0.0, False), ("b0.04", 0.04, False), ("b0.04_corrected", 0.04, True)):
            how = {"loss_type": loss_type, "beta": beta, "use_bias_correction_kl": corrected}
            trainer = grpo_trainer(folder, rewards, **how)
            logps = torch.tensor(out["logps"], requires_grad=True)
            trainer._get_per_token_logps_and_entropies = lambda *_, logps=logps, **__: (logps, logps * 0, None)
            ids = torch.ones(n, TOKENS, dtype=torch.long)
            inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids}
            inputs |= {"completion_mask": torch.tensor(out["mask"])}
            inputs |= {"advantages": torch.tensor(out["advantages__group"])}
            inputs |= {f"{m}_per_token_logps": torch.tensor(out[f"{m}_logps"]) for m in ("old", "ref")}
            loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
            out[f"loss__{loss_type}_{name}"] = loss.detach().numpy()
            out[f"grad__{loss_type}_{name}"] = logps.grad.numpy()
            print(f"{loss_type}_{name}: {loss.item():.6f}")
    return out


def main() -> None:
    logging.disable(logging.WARNING)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    versions = (
        f"script=tests/golden/make_losses.py python={platform.python_version()} torch={torch.__version__} "
        f"transformers={transformers.__version__} trl={trl.__version__} numpy={np.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "trl_dpo": dpo(np.random.default_rng(7), folder),
            "trl_reward": reward(np.random.default_rng(8)),
            "trl_grpo": grpo(np.random.default_rng(9), folder),
        }
    for name, arrays in files.items():
        np.savez_compressed(HERE / f"{name}.npz", made_with=np.array(versions), **arrays)


if __name__ == "__main__":
    main()
