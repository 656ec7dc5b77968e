"""Renders a checkpoint's chat template: a program of its author's, run in jinja2's immutable sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any
) -> str:
    """Returns the text of a conversation in the model's own format.

    `messages` is a list of dicts with at least a `role` and a `content`, both str. `variables` are what
    templates read besides: `bos_token`, `eos_token`. Raises TypeError or ValueError for messages of another
    form, and ValueError for a template that does not compile, refuses the messages (`raise_exception`) or
    tries to leave the sandbox.

    >>> render_chat("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
    ...             [{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    'user: Hi '
    """
    _check(messages)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except TemplateSyntaxError as error:
        raise ValueError(f"chat template: line {error.lineno}: {error.message}") from None
    except Exception as error:  # whatever the template's author wrote may fail in any way
        raise ValueError(f"chat template: {error}") from None


def _check(messages: Any) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one, got an empty list")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{i}]: expected a dict, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{i}]: expected the keys role and content, got {sorted(map(str, message))}")
            if not isinstance(message[key], str):
                raise TypeError(f"messages[{i}][{key!r}]: expected str, got {type(message[key]).__name__}")


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise ValueError(message)
