"""Conversations as the prompts of a loaded model."""

from typing import Any

import pytest

from hybrid.data.chat_template import ChatTemplate
from hybrid.data.tokenizer import ByteTokenizer
from hybrid.errors import ConfigError
from hybrid.generation.generator import Generator
from hybrid.generation.runner import Room, Runner
from tests.hybrid.generation.toys import make_weights
from tests.toy import MODEL

MESSAGES = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
]


def opened(**options: Any) -> Generator:
    return Generator(Runner(make_weights(MODEL), Room(slots=1, max_length=64)), ByteTokenizer(), "toy", **options)


def test_a_model_without_a_layout_of_conversations_refuses_them() -> None:
    with opened() as model, pytest.raises(ConfigError, match="no chat template; use /v1/completions"):
        model.chat(MESSAGES)


def test_a_model_that_has_learned_the_plain_layout_is_asked_in_it() -> None:
    with opened(plain_chats=True) as model:
        assert model.chats
        assert model.chat(MESSAGES) == [*b"User:\nOne?\nAssistant:\n1", 256, *b"User:\nTwo?\nAssistant:\n"]


def test_a_template_goes_before_the_plain_layout_and_says_what_it_refuses() -> None:
    template = ChatTemplate(
        "{% if messages | length > 1 %}{{ raise_exception('too many') }}{% endif %}{{ bos_token }}<"
    )
    with opened(plain_chats=True, chat_template=template) as model:
        assert model.chat(MESSAGES[:1]) == [*b"<"]
        with pytest.raises(ConfigError, match="messages: the tokenizer's chat template refuses it: too many"):
            model.chat(MESSAGES)


@pytest.mark.parametrize("program", ["1 // 0", "'a' + 1", "2.0 ** 9999", "messages.nothing.at_all"])
def test_whatever_a_template_fails_with_is_the_conversations_problem(program: str) -> None:
    with opened(chat_template=ChatTemplate("{{ " + program + " }}")) as model, pytest.raises(ConfigError) as caught:
        model.chat(MESSAGES)
    assert str(caught.value).startswith("messages: the tokenizer's chat template refuses it: ")
