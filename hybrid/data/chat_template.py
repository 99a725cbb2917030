"""A tokenizer's chat template: Jinja, run as Hugging Face's tokenizers run it, without importing their library."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

Message = dict[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and the special tokens that it may write (`bos_token` and the like), as (name, text)."""

    text: str
    tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: list[Message], *, add_generation_prompt: bool, **others: Any) -> str:
        """Return the conversation as text. Raises ValueError for what the template refuses."""
        values = {"tools": None, "documents": None, **dict(self.tokens), **others}
        try:
            return _compile(self.text).render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except Exception as error:  # a template is a program: it can divide by 0, too
            raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error

    def check(self) -> None:
        """Raise ValueError if it is no Jinja."""
        import jinja2

        try:
            _compile(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno} is no Jinja: {error}") from error


@lru_cache
def _compile(text: str) -> Any:
    """Compile a template in the sandbox and with the helpers that Hugging Face's tokenizers give it."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; here that is found otherwise."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """Keep what is inside."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made.from_string(text)


def find_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a Hugging Face tokenizer's folder; None if it has none.

    It is in chat_template.jinja, or in tokenizer_config.json: a text, or several by name, of which one is "default".
    Raises ValueError for files that are damaged.
    """
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return ChatTemplate(template, special_tokens(folder)) if isinstance(template, str) else None


def special_tokens(folder: Path) -> tuple[tuple[str, str], ...]:
    """Return the special tokens that a Hugging Face tokenizer's folder names, such as ("bos_token", "<s>")."""
    tokens = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    named = [(name, text) for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)]
    return tuple(sorted(named))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from error
