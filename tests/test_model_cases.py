"""What becomes of every kind of damaged, hostile or unfitting model: the table of cases M1 to M22.

A case is refused with one line before any weight reaches a device, or taken as its line says; and nothing that lies in
a folder is ever run: every folder here holds code that would leave a mark behind.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_models_loading import LLAMA, QWEN, randomised, refused, write_folder, write_gguf, write_shards

from aif.adapter import lora
from aif.api import load_adapter
from aif.checkpoint import save_arrays
from aif.corpus import Message
from aif.models import catalogue, hub, weights
from aif.tokens import encode_prompt

MARK = "was-run"  # the file that code of a folder would make


class Bomb:
    """What unpickles into a call."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def folder(place: Path, change=None, **settings) -> Path:
    """A whole model folder, with code, a pickle and pointers to them lying in it."""
    write_folder(place, LLAMA, randomised(LLAMA), change)
    hub.byte_tokenizer().save_pretrained(place)
    edit(place / "config.json", _attn_implementation_internal="evil.attention", trust_remote_code=True, **settings)
    edit(place / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    (place / "evil.py").write_text(f"import os\nos.mkdir({str(place / MARK)!r})\n")
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(place / MARK)))
    return place


def edit(file: Path, **values) -> Path:
    """A JSON file with other values; None takes a key away."""
    tree = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return file


def shards(place: Path, weight_map: dict | None = None) -> Path:
    write_shards(folder(place), LLAMA, randomised(LLAMA))
    if weight_map is not None:
        edit(place / "model.safetensors.index.json", weight_map=weight_map)
    return place


def without(file: Path) -> Path:
    file.unlink()
    return file.parent


def linked(place: Path) -> Path:
    outside = folder(place / "in") / "model.safetensors"
    outside.rename(place / "out.safetensors")
    outside.symlink_to(place / "out.safetensors")
    return place / "in"


def with_file(place: Path, content: bytes | Callable[[bytes], bytes], name: str = "model.safetensors") -> Path:
    """A folder of which one file holds something else."""
    file = folder(place) / name
    file.write_bytes(content(file.read_bytes()) if callable(content) else content)
    return place


def header(**tensors: tuple[list[int], list[int]]) -> bytes:
    """A safetensors file with these shapes and offsets and eight bytes of data."""
    listed = {key: {"dtype": "F32", "shape": s, "data_offsets": at} for key, (s, at) in tensors.items()}
    text = json.dumps(listed).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def raw_gguf(place: Path, keys: list[bytes], tensors: list[tuple[list[int], int, int]], size: int = 4096) -> Path:
    """A GGUF file of these metadata entries and tensors (dimensions, type, offset), with `size` bytes after it."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys]
    for number, (shape, kind, start) in enumerate(tensors):
        parts += [text(f"t{number}"), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, start)]
    file = place / "a.gguf"
    file.write_bytes(b"".join(parts))
    os.truncate(file, file.stat().st_size + size)  # a hole: it takes no room on the disk
    return file


def cut_gguf(place: Path, change: Callable[[bytes], bytes]) -> Path:
    file = write_gguf(place / "a.gguf", LLAMA, randomised(LLAMA))
    file.write_bytes(change(file.read_bytes()))
    return file


def poisoned(tensors: dict) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan


def retyped(tensors: dict) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


def one_shard_twice(place: Path) -> Path:
    shards(place)
    both = load_file(place / "model-1.safetensors") | load_file(place / "model-2.safetensors")
    save_file(both, place / "model-2.safetensors")
    return place


def without_end(place: Path) -> Path:
    tokenizer = hub.byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder(place))
    edit(place / "tokenizer_config.json", eos_token=None)
    return place


def more_tokens(place: Path) -> Path:
    tokenizer = hub.byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(folder(place))
    return place


LFS, PAGE = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html><html></html>"
ARRAY = text("k") + struct.pack("<IIQ", 9, 8, 1 << 40)  # an array of 2^40 texts
LONG = text("k") + struct.pack("<IQ", 8, 1 << 62)
KEY = text("k") + struct.pack("<II", 4, 1)
F32 = 0

REFUSED = {
    "M1 shard that the index names is absent": (
        lambda p: without(shards(p) / "model-2.safetensors"),
        "model-2.safetensors is missing",
    ),
    "M2 index leads to the folder above": (lambda p: shards(p, {"x": "../a.safetensors"}), "inside the folder"),
    "M2 index leads to an absolute path": (lambda p: shards(p, {"x": "/a.safetensors"}), "inside the folder"),
    "M2 weights are a link out of the folder": (linked, "inside the folder"),
    "M3 tensor is missing": (
        lambda p: folder(p, lambda t: t.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "M3 tensor is left over": (lambda p: folder(p, lambda t: t.update(x=np.zeros(1, "f4"))), "x is not part of"),
    "M3 tensor is in two shards": (one_shard_twice, "is in two shards"),
    "M4 tensor has another shape": (
        lambda p: folder(p, lambda t: t.update({"model.norm.weight": np.zeros(5, "f4")})),
        "shape [5], not [32]",
    ),
    "M4 tensor has another type": (lambda p: folder(p, retyped), "stored as I32"),
    "M5 header is cut off": (lambda p: with_file(p, lambda raw: raw[:100]), "damaged"),
    "M5 header is longer than the file": (lambda p: with_file(p, struct.pack("<Q", 1 << 60) + b"{}"), "damaged"),
    "M5 tensors overlap": (lambda p: with_file(p, header(a=([2], [0, 8]), b=([1], [4, 8]))), "damaged"),
    "M5 data has a hole": (lambda p: with_file(p, header(a=([1], [4, 8]))), "damaged"),
    "M6 Git LFS pointer": (lambda p: with_file(p, LFS), "git lfs pull"),
    "M6 web page": (lambda p: with_file(p, PAGE), "web page"),
    "M8 weight that is not a number": (lambda p: folder(p, poisoned), "model.layers.1.mlp.up_proj.weight has NaN"),
    "M9 only a pickle": (lambda p: without(folder(p) / "model.safetensors"), "never opened"),
    "M10 architecture that only its own code knows": (
        lambda p: folder(p, model_type="evil"),
        "'evil' is not supported",
    ),
    "M11 GGUF cut off": (lambda p: cut_gguf(p, lambda raw: raw[:5000]), "a.gguf"),
    "M11 GGUF of another magic": (lambda p: cut_gguf(p, lambda raw: b"GGML" + raw[4:]), "bad magic"),
    "M11 GGUF of another version": (
        lambda p: cut_gguf(p, lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:]),
        "version 9",
    ),
    "M11 GGUF alignment is no power of two": (
        lambda p: raw_gguf(p, [text("general.alignment") + struct.pack("<II", 4, 33)], []),
        "general.alignment 33",
    ),
    "M12 GGUF of more keys than bytes": (
        lambda p: cut_gguf(p, lambda raw: raw[:16] + struct.pack("<Q", 1 << 40) + raw[24:]),
        "header of",
    ),
    "M12 GGUF array longer than the file": (lambda p: raw_gguf(p, [ARRAY], [], 200 << 20), "an array of"),
    "M12 GGUF text longer than the file": (lambda p: raw_gguf(p, [LONG], [], 200 << 20), "a text needs"),
    "M13 GGUF dimensions overflow": (lambda p: raw_gguf(p, [], [([1 << 33, 1 << 33], F32, 0)]), "impossible shape"),
    "M13 GGUF tensor past the end": (lambda p: raw_gguf(p, [], [([8], F32, 1 << 40)]), "inside the file"),
    "M13 GGUF tensors overlap": (lambda p: raw_gguf(p, [], [([64], F32, 0), ([64], F32, 32)]), "overlaps another"),
    "M13 GGUF type is unknown": (lambda p: raw_gguf(p, [], [([8], 999, 0)]), "unknown type 999"),
    "M13 GGUF key twice": (lambda p: raw_gguf(p, [KEY, KEY], []), "appears twice"),
    "M18 more tokens than embeddings": (more_tokens, "260 tokens and the model 259"),
    "M19 no end token": (without_end, "names no end token"),
    "M19 no end token in a GGUF": (
        lambda p: cut_gguf(p, lambda raw: raw.replace(b"eos_token_id", b"eos_token_ix")),
        "names no end token",
    ),
    "M20 config.json is absent": (lambda p: without(folder(p) / "config.json"), "config.json: cannot be read"),
    "M20 heads that do not divide": (lambda p: folder(p, num_key_value_heads=3), "num_key_value_heads 3"),
    "M20 layers out of range": (lambda p: folder(p, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "M20 rotary base out of range": (lambda p: folder(p, rope_theta=-1.0), "rope_theta -1.0"),
}


def unrun(place: Path) -> bool:
    return not list(place.rglob(MARK))


@pytest.mark.parametrize("case", REFUSED)
def test_model_is_refused(tmp_path, case):
    """One line that names the file, little memory on the way, and nothing of the folder run."""
    build, words = REFUSED[case]
    source = build(tmp_path)
    tracemalloc.start()
    refused(lambda: hub.load(str(source)), str(source if source.is_dir() else source.parent), words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20 and unrun(tmp_path)


def test_m7_file_with_another_checksum_than_the_catalogue_records(tmp_path, monkeypatch):
    monkeypatch.setenv("AIF_CACHE", str(tmp_path))
    name = "smollm2-135m"
    (tmp_path / catalogue.CATALOGUE[name].file).write_bytes(b"GGUF, but not that one")
    refused(lambda: hub.load(name), catalogue.CATALOGUE[name].file, "its sha256 differs")


def test_m9_m10_code_and_pickles_beside_the_weights_are_left_alone(tmp_path):
    model = hub.load(str(folder(tmp_path)))
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 259) and unrun(tmp_path)
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert not unrun(tmp_path)  # so much for what opening it does


def test_m14_model_without_a_chat_template_reads_no_chats(tmp_path):
    model = hub.load(str(write_gguf(tmp_path / "a.gguf", QWEN, randomised(QWEN), pre="qwen2")))
    refused(lambda: encode_prompt(model.tokenizer, [Message("user", "Hi")], "rows.jsonl:3"), "rows.jsonl:3", "name one")


TEMPLATES = {
    "M15 syntax error": ("{% for %}", "TemplateSyntaxError"),
    "M15 refusal of the template's own": ("{{ raise_exception('system comes first') }}", "system comes first"),
    "M16 way out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "M16 no end": ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "does not end"),
    "M16 too much memory": ("{% set x = 'x' * 3000000000 %}{{ x | length }}", "more than 512 MB"),
    "M16 too long a text": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "is longer than"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_template_is_refused(tmp_path, case):
    template, words = TEMPLATES[case]
    edit(folder(tmp_path) / "tokenizer_config.json", chat_template=template)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = hub.load(str(tmp_path)).tokenizer
    refused(lambda: encode_prompt(tokenizer, [Message("user", "Hi")], "rows.jsonl:3"), "rows.jsonl:3", words)


def test_m17_a_template_that_asks_for_the_date_always_gets_the_same(tmp_path):
    (folder(tmp_path) / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}")
    tokenizer = hub.load(str(tmp_path)).tokenizer
    assert bytes(encode_prompt(tokenizer, [Message("user", "Hi")])) == b"2025-01-01"


def test_m18_fewer_tokens_than_embeddings_are_padding_of_the_vocabulary(tmp_path):
    wide = replace(LLAMA, vocab=320)
    write_folder(folder(tmp_path), wide, randomised(wide))
    facts = hub.inspect(str(tmp_path))
    assert (facts["tokens"], facts["vocab"]) == (259, 320)
    assert hub.load(str(tmp_path)).logits([[1]]).shape == (1, 1, 320)


def test_m19_the_tokenizer_says_which_token_ends_an_answer(tmp_path):
    """Rule: config.json's ids count for nothing, and a pad token is never asked for."""
    edit(folder(tmp_path, eos_token_id=7, pad_token_id=99999) / "tokenizer_config.json", pad_token=None)
    assert hub.load(str(tmp_path)).tokenizer.eos_token_id == 258


def test_m20_config_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_JSON_LIMIT", 100)
    refused(lambda: hub.load(str(folder(tmp_path))), "config.json", "too large")


def test_m21_adapter_of_another_model(tmp_path, lm):
    adapter = lora(lm.config, rank=1, alpha=1.0, key=jax.random.key(0))
    save_arrays(tmp_path / "trained.safetensors", adapter, {"meant": {"weights": "0" * 16}})
    refused(lambda: load_adapter(tmp_path, lm), "trained.safetensors", "other weights", lm.fingerprint)


def test_m22_too_little_memory_or_disk_is_told_in_numbers(tmp_path, monkeypatch):
    folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(weights.os, "sysconf", lambda name: 100)
        refused(lambda: hub.load(str(tmp_path)), str(tmp_path), "needs 0.0 GB as float32", "this machine has 0.0 GB")
    monkeypatch.setenv("AIF_CACHE", str(tmp_path / "cache"))
    room = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(catalogue.shutil, "disk_usage", lambda path: room)
    refused(lambda: hub.load("smollm2-135m"), "has 5 MB free", "smollm2-135m needs 217")


def test_every_case_has_a_test():
    named = " ".join([*REFUSED, *TEMPLATES, *(name.upper() for name in globals() if name.startswith("test_m"))])
    assert [n for n in range(1, 23) if f"M{n} " not in named and f"_M{n}_" not in named] == []
