"""Text as it arrives: whole characters, stop strings across tokens."""

import pytest

from hybrid.data.tokenizer import ByteTokenizer
from hybrid.generation.sampling import Chosen, Sampling
from hybrid.generation.text import TextStream, prompt_texts, text_bytes, token_text


def pieces(text: bytes, *stop: str) -> tuple[list[str], bool]:
    """What each byte gives, and the end."""
    stream = TextStream(ByteTokenizer(), b"", Sampling(stop=stop))
    given = []
    for byte in text:
        given.append(stream.push(Chosen(byte)).text)
        if stream.stopped:
            break
    return [*given, stream.finish("stop" if stream.stopped else "length").text], stream.stopped


def test_a_character_comes_whole() -> None:
    assert pieces("aé€".encode()) == (["a", "", "é", "", "", "€", ""], False)
    assert pieces("aé".encode()[:2]) == (["a", "", "\N{REPLACEMENT CHARACTER}"], False)


def test_text_that_may_become_a_stop_is_held_back_until_it_is_sure() -> None:
    assert pieces(b"to stop", "stop") == (["t", "o", " ", "", "", "", "", ""], True)
    assert pieces(b"stoat", "stop") == (["", "", "", "stoa", "t", ""], False)
    assert pieces(b"a sto", "stop")[0] == ["a", " ", "", "", "", "sto"]
    assert pieces(b"aab", "ab") == (["", "a", "", ""], True)


@pytest.mark.parametrize("stop", [("\n\n",), ("x", "yz"), ("zz", "z")])
def test_what_comes_is_the_text_up_to_the_first_stop(stop: tuple[str, ...]) -> None:
    text = "some text\n\nand more yz and x and zz"
    first = min(at for one in stop if (at := text.find(one)) >= 0)
    given, stopped = pieces(text.encode(), *stop)
    assert "".join(given) == text[:first] and stopped


def test_the_text_of_a_token() -> None:
    tokenizer = ByteTokenizer()
    assert token_text(tokenizer, b"ab", ord("c")) == "c"
    assert token_text(tokenizer, b"ab", 0xC3) == "bytes:\\xc3"
    assert token_text(tokenizer, b"ab", 256) == "<token 256>"


@pytest.mark.parametrize("echo", [False, True])
def test_each_byte_of_a_character_is_a_token_that_begins_where_the_character_does(echo: bool) -> None:
    tokenizer, content = ByteTokenizer(), "é日😀."
    ids = tokenizer.encode(content)
    stream = TextStream(tokenizer, ids, Sampling(logprobs=1, echo=echo))
    made = [stream.push(Chosen(token, -1.0, [(token, -1.0)])).tokens[0] for token in ids]
    made += stream.ended_by(Chosen(256, -1.0)).tokens
    for tokens, start in ((prompt_texts(tokenizer, ids, [Chosen(i) for i in ids[1:]]), 0), (made, 4 if echo else 0)):
        assert [token.offset - start for token in tokens[:10]] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3]
        assert [token.text for token in tokens[:10]] == [
            *(f"bytes:\\x{byte:02x}" for byte in content.encode()[:9]),
            ".",
        ]
        assert [text_bytes(token.text) for token in tokens[:10]] == [[byte] for byte in content.encode()]
    assert [token.top[0][0] for token in made[:10]] == [token.text for token in made[:10]]
    assert (made[10].text, made[10].offset - start, text_bytes(made[10].text)) == ("<token 256>", 4, None)
