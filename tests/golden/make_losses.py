"""Write the golden DPO losses (trl_dpo.npz), computed by TRL's own DPOTrainer.

    pip install torch transformers trl peft datasets    # an environment of its own, not the engine's
    python make_losses.py                               # needs tiny_llama/, which make_logits.py writes

TRL's loss lives inside `DPOTrainer._compute_loss`, between the model's forward passes and the metrics, so two stand-ins
take the place of the policy and the reference and return chosen numbers as log-probabilities; every line from there
to the loss is TRL's. The loss is asked for one pair at a time, so TRL's batch mean is that pair's loss.

Arrays: policy_chosen, policy_rejected, ref_chosen, ref_rejected [16] float32, and for beta 0.1 and 1.0 (`b0.1`,
`b1.0`) the losses [16] and their gradients by the two policy log-probabilities, `loss__X` and `grad_chosen__X`,
`grad_rejected__X`, where X is
    sigmoid_b0.1            loss_type "sigmoid", no label smoothing
    sigmoid_b0.1_ls0.1      the same with label_smoothing 0.1, which TRL's "sigmoid" does not read: equal to the first
    cdpo_b0.1_ls0.1         conservative DPO, (1 - e) * L(z) + e * L(-z): loss_type "aot", whose sorting does nothing
                            to a batch of one pair
    robust_b0.1_ls0.1       loss_type "robust", ((1 - e) * L(z) - e * L(-z)) / (1 - 2e)
"""

import logging
import os
import platform
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).resolve().parent
PAIRS = 16
SMOOTHING = 0.1
# name in the npz -> (loss_type, label_smoothing)
SETTINGS = {
    "sigmoid_b{}": ("sigmoid", 0.0),
    "sigmoid_b{}_ls0.1": ("sigmoid", SMOOTHING),
    "cdpo_b{}_ls0.1": ("aot", SMOOTHING),
    "robust_b{}_ls0.1": ("robust", SMOOTHING),
}


class StandIn(torch.nn.Module):
    """Returns the given sequence log-probabilities the way TRL's fused head does: one completion token each."""

    def __init__(self):
        super().__init__()
        self.log_probs = None

    def forward(self, **_):
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs,
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


def make_trainer(folder: str, loss_type: str, beta: float, smoothing: float) -> DPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(HERE / "tiny_llama", dtype=torch.float32)
    config = DPOConfig(
        output_dir=folder,
        beta=beta,
        loss_type=[loss_type],
        label_smoothing=smoothing,
        bf16=False,
        use_cpu=True,
        report_to=[],
        gradient_checkpointing=False,
    )
    rows = Dataset.from_list([{"prompt": "ask", "chosen": "good", "rejected": "bad"}])
    trainer = DPOTrainer(model=model, args=config, train_dataset=rows, processing_class=word_tokenizer())
    assert (trainer.beta, trainer.label_smoothing, trainer.loss_types) == (beta, smoothing, [loss_type])
    return trainer


def pair_losses(trainer: DPOTrainer, pairs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    policy = StandIn()
    trainer.ref_model = StandIn()
    # A row each for chosen and rejected: a prompt token, then one completion token that carries the log-probability
    inputs = {
        "input_ids": torch.tensor([[3, 4], [3, 5]]),
        "attention_mask": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
    }
    losses, chosen_grads, rejected_grads = [], [], []
    for i in range(PAIRS):
        policy.log_probs = torch.tensor(
            [[pairs["policy_chosen"][i]], [pairs["policy_rejected"][i]]], requires_grad=True
        )
        trainer.ref_model.log_probs = torch.tensor([[pairs["ref_chosen"][i]], [pairs["ref_rejected"][i]]])
        loss = trainer.compute_loss(policy, dict(inputs))
        loss.backward()
        losses.append(loss.item())
        chosen_grads.append(policy.log_probs.grad[0, 0].item())
        rejected_grads.append(policy.log_probs.grad[1, 0].item())
    return np.float32(losses), np.float32(chosen_grads), np.float32(rejected_grads)


def main() -> None:
    logging.disable(logging.WARNING)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(2)
    rng = np.random.default_rng(7)
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
    }
    out = dict(pairs)
    with tempfile.TemporaryDirectory() as folder:
        for beta in (0.1, 1.0):
            for name, (loss_type, smoothing) in SETTINGS.items():
                name = name.format(beta)
                loss, chosen, rejected = pair_losses(make_trainer(folder, loss_type, beta, smoothing), pairs)
                out[f"loss__{name}"] = loss
                out[f"grad_chosen__{name}"] = chosen
                out[f"grad_rejected__{name}"] = rejected
                print(f"{name}: mean {loss.mean():.6f} min {loss.min():.6f} max {loss.max():.6f}")
    versions = (
        f"script=tests/golden/make_losses.py python={platform.python_version()} torch={torch.__version__} "
        f"transformers={transformers.__version__} trl={trl.__version__} numpy={np.__version__}"
    )
    np.savez_compressed(HERE / "trl_dpo.npz", made_with=np.array(versions), **out)


if __name__ == "__main__":
    main()
