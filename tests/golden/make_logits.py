"""Write the golden logits the model tests compare with, computed by transformers in torch.

    pip install torch transformers safetensors  # an environment of its own, not the engine's
    python make_logits.py                       # tiny_llama(.npz), tiny_qwen2(.npz), families/*
    python make_logits.py --real smollm2-135m   # smollm2.npz too (folder: benchmarks/peers/make_hf_folder.py)

tiny_*.npz: tokens [2, 24] int32, logits [2, 24, 256] float32, hidden [layers, 2, 24, 32] float32 (the residual stream
after each block, before the final norm). Every logit comes from the folder as written, loaded again.

    tiny_llama   untied, llama3 rope scaling, config.json in the hub's form (`rope_theta`, `rope_scaling`)
    tiny_qwen2   tied, biases on q, k and v, config.json in transformers 5's form (`rope_parameters`)

families/NAME(.npz): a small random model of every family in FAMILIES, as transformers saves it. tokens [2, 20], logits
[2, 20, 96], hidden [layers, 2, 20, 32]; steered [2, 20, 96], the logits where `push` [32] is added to the output of
block 0; generated [2, 12], the greedy continuation of the tokens.

smollm2.npz: tokens [2, 32]; logits_first [2, 32, 512], the first 512 columns of the logits; logsumexp [2, 32] and
argmax [2, 32] over all of them; tokenizer_cases, a JSON list of {"text", "ids"}; chat_messages and chat_prompt_text
with chat_text, chat_ids, chat_prompt_ids (the same chat, and its first messages with the assistant's header).
All strings are plain numpy unicode: no pickle.
"""

import argparse
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
VOCAB, HIDDEN, LAYERS, LENGTH = 256, 32, 2, 24
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Heads are 8 wide, so there are four rotary frequencies. With theta 100 their wavelengths are 6.3, 19.9, 62.8 and
# 198.7 tokens: one below original_max / high (kept), one between the two bounds (blended), two above (divided by 8).
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA_THETA, QWEN_THETA = 100.0, 10000.0

SENTENCE = (
    "In 1969, two people walked on the Moon for the first time, and about 600 million others watched it live on "
    "television, many of them in the middle of the night."
)
CHAT = [
    {"role": "system", "content": "You are a careful assistant who answers in one sentence."},
    {"role": "user", "content": "Why is the sky blue at 12:30, but red at sunset?"},
    {"role": "assistant", "content": "Air scatters blue light far more than red, and at sunset the path is longer."},
]
TEXTS = [
    "Hello, world!",
    "",
    " ",
    "\n",
    "12345",
    "In 2024, 3.14159 is -2.5e-10 off; call +1 (555) 010-9999.",
    "x =   5",
    "List:\n\n1. First\n\n2. Second\n10. Tenth",
    "a\n5",
    "H²O costs ½ of 10€ ①②③",
    "٠١٢ and ०१२ and １２３",
    "日本語 テスト 123",
    "Привет, мир! Γειά σου Κόσμε 42",
    "مرحبا بالعالم ٤٢ שלום",
    "한국어 문장과 English mixed ไทย",
    "emoji 🙂 and 👩‍👩‍👧 and 🙂‍↔️ and 🇫🇷",
    "e\u0301 is not é",
    "  leading  spaces\t\ttabs \n \n end  ",
    "   three",
    "don't I'LL we've it's 'quoted'",
    "def f(x):\n    return x**2  # 10%\n",
    "null\x00byte, bell\x07, escape\x1b[0m, delete\x7f, next line\x85",
    "zero\u200bwidth\u2060and\ufeffmarks\u00a0here",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|>",
    "text<|endoftext|>more <|im_start| > <|not_special|>",
    "<repo_name>a/b<file_sep>c.py<empty_output>",
    "ﷺ ﬁ ﬂ ǅ",
    "https://example.org/a?b=1&c=%20#d_2",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "CamelCaseWordsAndSNAKE_CASE_100",
    "\U0001d518\U0001d52b\U0001d526 \U00020000 \U0010ffff",
    "\r\nwindows\r\nlines\r",
]


def made_with(**more) -> np.ndarray:
    parts = {
        "script": "tests/golden/make_logits.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        **more,
    }
    return np.array(" ".join(f"{k}={v}" for k, v in parts.items()))


def randomise(model: torch.nn.Module, generator: torch.Generator, embed_std: float) -> None:
    """Weights whose blocks, attention and norms all matter, with logits of a few units."""

    def normal(parameter, std):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                normal(parameter, 0.5)
            elif "norm" in name:
                normal(parameter, 0.2)
                parameter.add_(1.0)
            elif "embed_tokens" in name:
                normal(parameter, embed_std)
            elif "lm_head" in name:
                normal(parameter, 3.0 / parameter.shape[1] ** 0.5)
            elif "q_proj" in name or "k_proj" in name:
                normal(parameter, 1.5 / parameter.shape[1] ** 0.5)
            else:
                normal(parameter, 1.0 / parameter.shape[1] ** 0.5)


# Sequences are 20 long, so that windows of 6 hide something. Gemma keeps a norm's gain as w and multiplies by 1 + w.
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6}
WINDOWS = ["full_attention", "sliding_attention"]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
}
THREE = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
FAMILIES = {  # name -> (model_type, settings)
    "mistral": ("mistral", {"sliding_window": 6, "head_dim": 12}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "layer_types": WINDOWS}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**GEMMA, **THREE, "rope_parameters": GEMMA3_ROPE}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi4": ("phi3", {"rope_parameters": LONGROPE, "num_attention_heads": 4, "original_max_position_embeddings": 32}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "norm_topk_prob": False,
        },
    ),
}


def randomise_family(model: torch.nn.Module, generator: torch.Generator, gemma: bool) -> None:
    """Like `randomise`, for experts (stacked over the first axis) and gains around zero too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.5 if name.endswith("bias") else 1.0 / parameter.shape[-1] ** 0.5
            if "norm" in name:
                std = 0.2
            elif "embed_tokens" in name:
                std = 0.2 if gemma else 0.7
            elif "gate.weight" in name or "q_proj" in name or "k_proj" in name:
                std = 2.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and not gemma:
                parameter.add_(1.0)


def make_family(name: str, seed: int) -> None:
    kind, settings = FAMILIES[name]
    settings = {**SMALL, "tie_word_embeddings": kind.startswith("gemma"), **settings}
    if "rope_parameters" not in settings:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise_family(model, torch.Generator().manual_seed(seed), kind.startswith("gemma"))
    folder = HERE / "families" / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 95, (2, 20), dtype=np.int32)
    push = rng.normal(size=32).astype(np.float32) * 0.5
    seen: list[torch.Tensor] = []
    ids = torch.from_numpy(tokens).long()
    hooks = [
        layer.register_forward_hook(lambda _m, _i, o: seen.append((o[0] if isinstance(o, tuple) else o).clone()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = torch.stack(seen)
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        torch.testing.assert_close(torch.stack(states[1:-1]), hidden[:-1])  # the last one is after the final norm
        for hook in hooks:
            hook.remove()
        generated = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)[:, 20:]
        add = torch.from_numpy(push)
        model.model.layers[0].register_forward_hook(
            lambda _m, _i, o: (o[0] + add, *o[1:]) if isinstance(o, tuple) else o + add
        )
        steered = model(input_ids=ids, use_cache=False).logits
    arrays = {"tokens": tokens, "logits": logits.numpy(), "hidden": hidden.numpy(), "push": push}
    arrays |= {"steered": steered.numpy(), "generated": generated.numpy().astype(np.int32)}
    np.savez_compressed(HERE / "families" / f"{name}.npz", **arrays, made_with=made_with())
    size = sum(p.stat().st_size for p in folder.iterdir()) + (HERE / "families" / f"{name}.npz").stat().st_size
    print(f"{name}: {size} bytes, logits std {logits.std():.2f} max {abs(logits).max():.2f}")


def write_folder(model, config: dict, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    weights = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def forward(folder: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits, and what each block hands to the next (before the final norm)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    hidden = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, o: hidden.append((o[0] if isinstance(o, tuple) else o).clone()))
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
        # What the hooks saw must lead to the same logits through the final norm and the head
        torch.testing.assert_close(model.lm_head(model.model.norm(hidden[-1])), logits)
    return logits.numpy(), torch.stack(hidden).numpy()


def tiny_llama() -> tuple[torch.nn.Module, dict]:
    rope = {"rope_theta": LLAMA_THETA, **LLAMA3}
    settings = {**SHAPE, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=dict(rope)))
    randomise(model, torch.Generator().manual_seed(1), embed_std=1.0)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": HIDDEN // SHAPE["num_attention_heads"],
        "torch_dtype": "float32",
        "rope_theta": LLAMA_THETA,
        "rope_scaling": LLAMA3,
        **settings,
    }
    return model, config


def tiny_qwen2() -> tuple[torch.nn.Module, dict]:
    rope = {"rope_type": "default", "rope_theta": QWEN_THETA}
    settings = {**SHAPE, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu"}
    model = Qwen2ForCausalLM(Qwen2Config(**settings, rope_parameters=dict(rope), use_sliding_window=False))
    randomise(model, torch.Generator().manual_seed(2), embed_std=0.5)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "use_sliding_window": False,
        "rope_parameters": rope,
        **settings,
    }
    return model, config


def make_tiny(name: str, build, seed: int) -> None:
    model, config = build()
    folder = HERE / name
    write_folder(model, config, folder)
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH), dtype=np.int32)
    logits, hidden = forward(folder, tokens)
    with torch.no_grad():  # the folder must say all that the model in memory knows
        torch.testing.assert_close(model.eval()(torch.from_numpy(tokens).long()).logits.numpy(), logits)
    np.savez_compressed(HERE / f"{name}.npz", tokens=tokens, logits=logits, hidden=hidden, made_with=made_with())
    size = sum(p.stat().st_size for p in folder.iterdir())
    print(f"{name}: folder {size} bytes, logits std {logits.std():.2f} max {abs(logits).max():.2f}")


def make_real(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    plain = tokenizer(SENTENCE)["input_ids"]
    chat_text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    chat_prompt_text = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    chat_ids = tokenizer(chat_text, add_special_tokens=False)["input_ids"]
    chat_prompt_ids = tokenizer(chat_prompt_text, add_special_tokens=False)["input_ids"]
    assert chat_ids == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert chat_ids[: len(chat_prompt_ids)] == chat_prompt_ids
    tokens = np.array([plain[:32], chat_ids[:32]], np.int32)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
    cases = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text, text
        cases.append({"text": text, "ids": ids})
    np.savez_compressed(
        HERE / "smollm2.npz",
        tokens=tokens,
        logits_first=logits[..., :512].numpy(),
        logsumexp=torch.logsumexp(logits.double(), -1).float().numpy(),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
        tokenizer_cases=np.array(json.dumps(cases)),
        chat_messages=np.array(json.dumps(CHAT)),
        chat_text=np.array(chat_text),
        chat_ids=np.array(chat_ids, np.int32),
        chat_prompt_text=np.array(chat_prompt_text),
        chat_prompt_ids=np.array(chat_prompt_ids, np.int32),
        made_with=made_with(weights="SmolLM2-135M-Instruct.Q4_1.gguf-as-float32"),
    )
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.from_numpy(tokens[0, 1:]).long())
    print(f"smollm2: {len(cases)} tokenizer cases, {len(chat_ids)} chat ids, plain sentence's loss {loss:.3f}")
    print("next after the plain 32 tokens:", repr(tokenizer.decode(int(logits[0, -1].argmax()))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="folder of SmolLM2-135M-Instruct: write smollm2.npz too")
    args = parser.parse_args()
    torch.set_num_threads(2)
    logging.disable_progress_bar()
    make_tiny("tiny_llama", tiny_llama, 11)
    make_tiny("tiny_qwen2", tiny_qwen2, 12)
    for number, name in enumerate(FAMILIES):
        make_family(name, 20 + number)
    if args.real:
        make_real(args.real)


if __name__ == "__main__":
    main()
