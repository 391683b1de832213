"""The child process that renders chat templates: `[template, values]` in, `{"text"}` or `{"error"}` out, a line each.

It is run as a file, so that it imports jinja2 and nothing of this package. Running out of time ends it.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks what the assistant wrote, is what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def environment(today: str) -> ImmutableSandboxedEnvironment:
    """What transformers gives a template: its sandbox, filters and functions; but the date is `today` for ever."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    date = datetime.datetime.fromisoformat(today)
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = date.strftime
    return made


def render(template: Any, values: dict[str, Any], most: int) -> str:
    """The template's text, which may have `most` characters."""
    parts, size = [], 0
    for part in template.generate(**values):
        size += len(part)
        if size > most:
            _refuse(f"its text is longer than {most} characters")
        parts.append(part)
    return "".join(parts)


def main(seconds: str, megabytes: str, output: str, today: str) -> None:
    made, compiled = environment(today), {}
    most = int(megabytes) << 20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(seconds))  # CPU time; its signal ends this process
        try:
            template, values = json.loads(line)
            if template not in compiled:
                compiled[template] = made.from_string(template)
            answer = {"text": render(compiled[template], values, int(output))}
        except MemoryError:
            answer = {"error": f"it needs more than {megabytes} MB"}
        except Exception as error:  # jinja2 raises many kinds; all of them are the template's word
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
