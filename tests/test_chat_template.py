"""Chat templates: the text that transformers makes of them, and what becomes of hostile ones."""

from __future__ import annotations

import types

import pytest

from aif.errors import BadInput
from aif.models.chat_template import OUTPUT, chat_text
from aif.models.hub import byte_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a <b> & 'c' \u00e9 \U0001f642"},
    {"role": "assistant", "content": " done \n"},
    {"role": "user", "content": "{{ 7 * 7 }}"},
]


def speaker(template: str):
    """Something with a chat template, as a tokenizer of a foreign folder is."""
    return types.SimpleNamespace(get_chat_template=lambda: template, special_tokens_map={"bos_token": "<s>"})


TEMPLATES = {
    "turns": "{% for m in messages %}<{{ m['role'] }}>{{ m.content | trim }}\n{% endfor %}",
    "opening": "{{ bos_token }}{% if add_generation_prompt %}A:{% endif %}",
    "marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "json": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "blanks": "  {% if true %}\n  x\n  {% endif %}\ny",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer_next", [False, True])
def test_text_is_that_of_transformers(name, answer_next):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=answer_next)
    assert chat_text(tokenizer, CHAT, answer_next=answer_next, where="x") == wanted


def test_own_template_is_rendered_alike():
    tokenizer = byte_tokenizer()
    wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, CHAT, answer_next=True, where="x") == wanted


def test_the_date_never_changes():
    assert chat_text(speaker("{{ strftime_now('%d %b %Y') }}"), CHAT, answer_next=False, where="x") == "01 Jan 2025"


HOSTILE = {
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "refusal": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "attribute": ("{{ raise_exception.__globals__['sys'].exit(0) }}", "SecurityError"),
    "file": ("{% include '/etc/passwd' %}", "no loader|TypeError"),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not end|Overflow",
    ),
    "long": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", f"longer than {OUTPUT}"),
    "memory": ("{% set x = 'x' * 3000000000 %}{{ x | length }}", "more than 512 MB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_and_the_next_one_renders(name):
    template, words = HOSTILE[name]
    with pytest.raises(BadInput, match=words) as caught:
        chat_text(speaker(template), CHAT, answer_next=False, where="rows.jsonl:3")
    assert str(caught.value).startswith("rows.jsonl:3: ") and "\n" not in str(caught.value)
    assert chat_text(speaker("fine"), CHAT, answer_next=False, where="x") == "fine"
