"""Conversations and prompts as the tokens that a model is given and those that it learns to say."""

import json
import shutil

import pytest

from hybrid.data import chat
from hybrid.data.chat import Part
from hybrid.data.chat_template import ChatTemplate, find_template
from hybrid.data.examples import Example, encode_examples
from hybrid.data.tokenizer import ByteTokenizer, load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_without_a_template_every_message_stands_under_its_role():
    assert chat.conversation(None, MESSAGES) == [
        Part("System:\nBe brief.\nUser:\nOne?\nAssistant:\n", False),
        Part("1", True),
        Part("User:\nTwo?\nAssistant:\n", False),
        Part("2", True),
    ]


def test_a_template_lays_out_and_the_assistants_words_are_learned():
    assert chat.conversation(ChatTemplate(CHATML), MESSAGES[1:]) == [
        Part("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        Part("1<|im_end|>\n", True),
        Part("<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        Part("2<|im_end|>\n", True),
    ]


def test_a_template_without_a_prompt_for_the_assistant_has_its_header_learned():
    text = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template = ChatTemplate(text, (("eos_token", "$"),))
    assert chat.conversation(template, MESSAGES[1:3]) == [Part("[user]One?$", False), Part("[assistant]1$", True)]


def test_what_follows_the_last_message_of_the_assistant_is_left_out():
    assert chat.conversation(None, [*MESSAGES[1:3], {"role": "user", "content": "Thanks"}]) == [
        Part("User:\nOne?\nAssistant:\n", False),
        Part("1", True),
    ]


def test_templates_have_the_helpers_of_transformers():
    transformers_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | tojson }}{% endgeneration %}"
        "{% else %}{{ m | tojson(indent=1) }}{% endif %}{% endfor %}"
    )
    theirs, _ = transformers_utils.render_jinja_template([MESSAGES], chat_template=template, bos_token="ß")
    ours = ChatTemplate(template, (("bos_token", "ß"),)).render(MESSAGES, add_generation_prompt=False)
    assert ours == theirs[0]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, [], "'messages' is not a list of messages"),
        (None, "hello", "'messages' is not a list of messages"),
        (None, [{"content": "x"}], "message 1 is not an object with a 'role'"),
        (None, MESSAGES[:2], "there is no message of the assistant to learn"),
        (None, [{"role": "assistant", "content": None}], "the content of message 1 is not a text"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, "chat template refuses it: roles must alternate"),
        # Like the templates that take a model's thoughts out of all turns but the last.
        (
            "{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            MESSAGES,
            "writes earlier messages otherwise once others follow",
        ),
    ],
)
def test_a_conversation_that_cannot_be_laid_out_is_refused(template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.conversation(ChatTemplate(template) if template else None, messages)


def test_a_prompt_is_what_training_has_before_a_response():
    tokenizer = ByteTokenizer()
    parts = chat.encode(tokenizer, chat.conversation(None, MESSAGES))
    given = [i for ids in parts[:-1] for i in ids]
    assert chat.prompt(tokenizer, None, MESSAGES[:-1]) == given
    assert given.count(tokenizer.eod) == 1  # after the assistant's first words
    assert parts[-1] == [*b"2", tokenizer.eod]


def test_a_prompt_of_a_template_is_its_text_even_if_it_writes_earlier_messages_otherwise(tokenizer_folder):
    text = "{{ bos_token }}{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    template = ChatTemplate(text, (("bos_token", "<s>"),))
    tokenizer = load_tokenizer(str(tokenizer_folder / "with_bos"))
    assert chat.prompt(tokenizer, template, MESSAGES[:-1]) == tokenizer.encode_parts(["Two?"])[0]  # <s> is there once


def test_a_template_is_found_where_tokenizers_keep_it(tmp_path, tokenizer_folder):
    folder = tmp_path / "chatty"
    shutil.copytree(tokenizer_folder / "with_bos", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for value in (CHATML, [{"name": "tools", "template": "-"}, {"name": "default", "template": CHATML}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
        assert find_template(folder) == ChatTemplate(CHATML, (("bos_token", "<s>"), ("eos_token", "<|endoftext|>")))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for spec in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.chat_template is not None and tokenizer.chat_template.text == "{{ messages }}"
        tokenizer.save(tmp_path / f"saved {spec.name}")
        assert load_tokenizer(str(tmp_path / f"saved {spec.name}")).chat_template == tokenizer.chat_template
    assert load_tokenizer(str(tokenizer_folder / "huggingface")).chat_template is None


@pytest.mark.parametrize("name", ["huggingface", "with_bos", "bpe.model", "unigram.model", "tiktoken.json"])
def test_parts_are_encoded_as_generation_goes_on_from_them(tokenizer_folder, name):
    tokenizer = load_tokenizer(str(tokenizer_folder / name))
    for texts in (["It's a text: ", "1234 größer"], ["a", "", " 漢字"], ["x y", "z"]):
        parts = tokenizer.encode_parts(texts)
        if name == "with_bos":
            assert parts[0][0] == tokenizer.encode("")[0]
        everything = [i for part in parts for i in part]
        assert tokenizer.decode(everything) == "".join(texts)
        if texts[0][-1] != " ":  # a space before a word is one token with it, also where the parts are cut
            assert parts[0] == tokenizer.encode(texts[0])


def test_what_a_tokenizer_puts_before_a_text_is_there_once(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder / "with_bos"))
    assert tokenizer.encode_parts(["<s>a", "b"]) == tokenizer.encode_parts(["a", "b"])


def test_a_prompt_and_its_response_stand_as_they_are():
    tokenizer = ByteTokenizer()
    pick = Example(None)
    records = [{"prompt": "1+1=", "response": "2"}, {"prompt": "", "completion": "hi", "id": 3}]
    encoded = encode_examples(tokenizer, [pick(record) for record in records])
    assert encoded.tokens.tolist() == [*b"1+1=2", 256, *b"hi", 256]
    assert encoded.lengths.tolist() == [4, 2, 0, 3] and encoded.counts.tolist() == [2, 2]
    assert encoded.text_bytes == 7


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"neither 'messages' nor 'prompt' with 'response' \(keys: 'text'\)"),
        ({"prompt": "a"}, r"neither 'messages' nor .* \(keys: 'prompt'\)"),
        ({"prompt": "a", "response": 3}, "'response' is not a text"),
        ({"prompt": None, "response": "b"}, "'prompt' is not a text"),
        ({"prompt": "", "response": ""}, "'prompt' and 'response' are both empty"),
    ],
)
def test_a_record_that_is_no_example_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Example(None)(record)
