"""One call to an OpenAI-compatible chat address: a question in, the parsed reply out, or why there is none."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

from aif.errors import BadInput

LARGEST_REPLY = 1 << 20  # bytes
MAX_TOKENS = 16  # a level word and what models put around it
TOP = 20  # alternatives asked for per token; the most that OpenAI gives


class Again(Exception):
    """A call that gave nothing usable, and its cause in a few words.

    Attributes:
      wait: seconds the server asks to wait. repeat: whether another try may help.
      fix: what to do when no try helps; without one the question is given up, and only it.
    """

    def __init__(self, cause: str, *, wait: float = 0.0, repeat: bool = True, fix: str = ""):
        super().__init__(cause)
        self.cause, self.wait, self.repeat, self.fix = cause, wait, repeat, fix


class _Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are refused: urllib would carry the key to whatever host it is sent to."""

    def redirect_request(self, *args: Any) -> None:
        return None


def complete(
    base: str,
    served: str,
    prompt: str | Sequence[Any],
    *,
    key_variable: str,
    timeout: float,
    logprobs: bool = False,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
    section: str = "judge",
) -> Any:
    """The reply of the model `served` at `{base}/chat/completions`, parsed but unchecked.

    Args:
      prompt: what the user says, or the messages of a conversation.
      section: whose options the errors name.
      key_variable: environment variable that holds the key; nothing is sent where it is empty.
      timeout: seconds the whole call may take, give or take one read.
      logprobs: whether to ask for the alternatives to each token of the reply.

    Raises:
      Again: too slow, too busy, broken off, or not JSON.
      BadInput: wrong address, model or key.
    """
    said = [("user", prompt)] if isinstance(prompt, str) else [(m.role, m.content) for m in prompt]
    body: dict[str, Any] = {"model": served, "messages": [{"role": role, "content": words} for role, words in said]}
    body |= {"temperature": temperature, "max_tokens": max_tokens}
    body |= {"logprobs": True, "top_logprobs": TOP} if logprobs else {}
    headers = {"Content-Type": "application/json", "User-Agent": "aif"}
    key = secret(key_variable)
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=timeout) as response:
            return json.loads(_drain(response, timeout))
    except HTTPError as error:
        raise _refused(error, f"{base}: HTTP {error.code}", served, key_variable, section) from None
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, TimeoutError):
            raise Again("no reply in time") from None
        fix = f"check that the server runs and that {section}.endpoint is its address"
        raise Again(f"cannot be reached: {_plain(str(reason))}", fix=fix) from None
    except (ValueError, RecursionError, HTTPException):  # not HTTP, cut short, not UTF-8, not JSON, or far too large
        raise Again("malformed reply") from None


def secret(variable: str) -> str:
    """The key in an environment variable; "" where there is none.

    Raises:
      BadInput: it holds characters that no header may carry.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise BadInput(f"{variable}: the key in this environment variable holds odd characters; copy it again")
    return key


def _refused(error: HTTPError, where: str, served: str, key_variable: str, section: str) -> Exception:
    """What an HTTP status means: mend it, wait, try again, or give this question up."""
    code, wait = error.code, _retry_after(error.headers.get("Retry-After"))
    try:
        with error:
            said = _plain(error.read(2000).decode(errors="replace"), secret(key_variable))
    except (OSError, HTTPException):
        said = "no reason given"
    if code in (401, 403):
        return BadInput(
            f"{where}: the key is refused ({said}); put a valid one into the environment variable {key_variable}, or "
            f"name another variable in {section}.key_variable"
        )
    if code in (404, 405) or code < 400:
        return BadInput(
            f"{where}: there is no chat/completions for the model {served!r} ({said}); check {section}.endpoint (it "
            f"often ends in /v1) and {section}.served"
        )
    if code == 429:
        return Again("HTTP 429", wait=wait, fix=f"lower {section}.concurrency, or check the account's limits")
    return Again(f"HTTP {code}", wait=wait, repeat=code >= 500 or code in (408, 425))


def _drain(response: Any, timeout: float) -> bytes:
    """The body, within the timeout as a whole (urllib's own bounds every read by itself)."""
    end, body = time.monotonic() + timeout, b""
    while part := response.read1(1 << 16):
        body += part
        if time.monotonic() > end:
            raise TimeoutError
        if len(body) > LARGEST_REPLY:
            raise ValueError("reply too large")
    return body


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or a date; 0 where it makes no sense."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return 0.0


def _plain(text: str, key: str = "") -> str:
    """A server's words in one short printable line, without the key."""
    text = text.replace(key, "***") if key else text
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:160] or "no reason given"


__all__ = ["Again", "complete", "secret"]
