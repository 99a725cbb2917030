"""A chat as one prompt, through the template that a tokenizer brings (Jinja, as transformers renders it)."""

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybrid.errors import ConfigError, Problem


def render(template: str | None, messages: list[dict[str, Any]]) -> str:
    """The prompt that asks for the assistant's next turn.

    Raises ConfigError if there is no template, or if it refuses these messages.
    """
    if template is None:
        raise ConfigError(
            Problem("messages", "this model's tokenizer has no chat template; use /v1/completions, or --chat-template")
        )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
    try:
        compiled = environment.from_string(template)
        return compiled.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="")
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(Problem("messages", f"the chat template refuses them: {error}")) from error


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
