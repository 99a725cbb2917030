"""Many requests on few slots: the same texts as alone, and nothing left behind."""

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid.data.tokenizer import ByteTokenizer
from hybrid.errors import ConfigError, UserError
from hybrid.generation.engine import Closed, Job, QueueFull
from hybrid.generation.generator import Completion, Generator
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import Piece
from tests.hybrid.generation.conftest import Toy

PROMPTS = ["a", "def ", "class Reader:\n", "x" * 37, "import os, sys\n", "é and ü, two bytes each", "q" * 16, "z" * 17]


@pytest.fixture(params=[False, True], ids=["step by step", "a step ahead"])
def model(hybrid_model: Toy, request: pytest.FixtureRequest) -> Iterator[Generator]:
    """In the second form it goes round as it does on CUDA: the host hands over a token while the next is computed."""
    with Generator(hybrid_model.runner(slots=4), ByteTokenizer(), "toy", max_waiting=2000) as generator:
        generator.engine.ahead = request.param
        yield generator


def tokens_of(pieces: Any) -> list[int]:
    return [token.token for piece in pieces for token in piece.tokens]


def test_greedy_text_is_that_of_reading_everything_again_for_each_token(toy_model: Toy) -> None:
    prompt = list(b"def ")
    text = list(prompt)
    for _ in range(12):
        text.append(int(toy_model.whole(torch.tensor([text]))[0, -1].argmax()))
    for chunk in (1, 3, 16):
        with Generator(toy_model.runner(prefill_chunk=chunk), ByteTokenizer(), "toy") as model:
            found = tokens_of(model.stream(prompt, temperature=0, max_tokens=12, ignore_end=True))
        assert found == text[len(prompt) :]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
def test_a_text_does_not_depend_on_what_else_is_made(model: Generator, settings: dict[str, Any]) -> None:
    """Token by token the same: alone, and among others that come, go, and are of other lengths and settings."""
    settings = {"max_tokens": 20, "ignore_end": True, **settings}
    alone = [tokens_of(model.stream(prompt, **settings)) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, **settings)
    assert [[token.token for token in text.tokens] for text in together] == alone
    others = [
        model.stream(prompt, max_tokens=n, temperature=2.0, ignore_end=True) for n, prompt in enumerate(PROMPTS, 3)
    ]
    again = [tokens_of(model.stream(prompt, **settings)) for prompt in PROMPTS]
    assert again == alone
    for other in others:
        assert tokens_of(other)


def test_a_seed_gives_the_same_text_and_another_seed_another(model: Generator) -> None:
    def text(seed: int | None) -> list[int]:
        return tokens_of(model.stream("abc", seed=seed, temperature=1.5, max_tokens=30))

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)


def test_log_probabilities_of_prompt_and_text_are_the_models(model: Generator, hybrid_model: Toy) -> None:
    prompt = "def main():\n    pass  # 33 tokens\n"
    text = model.generate(prompt, temperature=0, max_tokens=5, logprobs=3, echo=True, ignore_end=True)
    ids = [token.token for token in text.tokens]
    assert bytes(ids[: len(prompt)]) == prompt.encode() and len(ids) == len(prompt) + 5
    shares = hybrid_model.whole(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert text.tokens[0].logprob is None
    for i, token in enumerate(text.tokens[1:]):
        # Float32 logits of size 1 to 10, summed in another order.
        assert token.logprob == pytest.approx(float(shares[i, token.token]), abs=2e-4)
        assert [value for _, value in token.top] == pytest.approx(shares[i].topk(3).values.tolist(), abs=2e-4)


def test_reading_a_long_prompt_does_not_hold_up_the_others(model: Generator) -> None:
    """A prompt of three pieces takes three rounds, and the others get a token in each."""
    order: list[str] = []

    def listener(name: str) -> Any:
        return lambda piece: order.append(name)

    sampling = Sampling(max_tokens=20, temperature=0, ignore_end=True)
    short = model.job(list(b"a"), sampling, listener("short"))
    long = model.job(list(b"b" * 40), Sampling(max_tokens=1, ignore_end=True), listener("long"))
    ended = threading.Event()
    short.on_end, before = (lambda reason: (before(reason), ended.set())), short.on_end  # type: ignore[assignment]
    model.engine.submit(short, long)
    assert ended.wait(60)
    assert 2 <= order.index("long") < 20


def test_a_thousand_requests_leave_no_slot_behind(model: Generator) -> None:
    chance = random.Random(0)
    reasons: list[str] = []
    done = threading.Event()
    jobs: list[Job] = []

    def listener(piece: Piece) -> None:
        if piece.reason:
            reasons.append(piece.reason)
            if len(reasons) == 1000:
                done.set()

    for _ in range(1000):
        sampling = Sampling(
            max_tokens=chance.choice([0, 1, 2, 3, 5, 8]),
            temperature=chance.choice([0, 1.0]),
            stop=chance.choice([(), ("e",), ("ab", "c")]),
            stop_tokens=chance.choice([(), (101, 32)]),
            logprobs=chance.choice([None, None, None, 2]),
            echo=chance.random() < 0.1,
        )
        prompt = [chance.randrange(256) for _ in range(chance.choice([1, 2, 5, 16, 17, 40]))]
        jobs.append(model.job(prompt, sampling, listener))
    for start in range(0, 1000, 100):
        model.engine.submit(*jobs[start : start + 100])
        model.engine.cancel(*chance.sample(jobs[: start + 100], 30))
    assert done.wait(120)
    assert model.close(60)
    engine = model.engine
    assert (engine.waiting, engine.running) == (0, 0)
    assert sorted(engine._free) == list(engine.runner.reading_rows)
    assert {"cancelled", "stop", "length"} <= set(reasons) and "error" not in reasons


def test_leaving_a_stream_frees_its_slot(model: Generator) -> None:
    for _ in range(8):  # twice as many as there are slots
        pieces = iter(model.stream("a", max_tokens=40, ignore_end=True))
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    model.stream("a", max_tokens=40)  # is never asked for a piece, and so is not begun
    assert model.engine.running + model.engine.waiting <= 1
    assert model.generate("a", max_tokens=2, ignore_end=True).reason == "length"


def test_a_full_queue_and_a_closed_engine_refuse(hybrid_model: Toy) -> None:
    model = Generator(hybrid_model.runner(slots=2), ByteTokenizer(), "toy", max_waiting=1)
    sampling, ignored = Sampling(max_tokens=60, ignore_end=True), lambda piece: None
    jobs = [model.job([1], sampling, ignored) for _ in range(4)]
    with pytest.raises(ConfigError, match="4 texts are asked for at once, and there is room for 2 and for 1 that wait"):
        model.engine.submit(*jobs)
    model.engine.submit(*jobs[:3])
    with pytest.raises(QueueFull, match="waiting already"):
        model.engine.submit(jobs[3])
    assert model.close()
    assert all(job.row.position == 60 for job in jobs[:3])
    with pytest.raises(Closed):
        model.start([1], sampling, ignored)


def test_closing_ends_a_text_whose_prompt_is_being_read(hybrid_model: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = hybrid_model.runner(slots=2)
    reading, go_on, read = threading.Event(), threading.Event(), runner.read

    def slow(*given: Any) -> torch.Tensor:
        reading.set()
        go_on.wait()
        return read(*given)

    monkeypatch.setattr(runner, "read", slow)
    model = Generator(runner, ByteTokenizer(), "toy")
    ended: list[str | None] = []
    model.start([1], Sampling(max_tokens=60, ignore_end=True), lambda piece: ended.append(piece.reason))
    reading.wait()
    assert (model.engine.running, model.engine.waiting) == (1, 0)
    threading.Timer(0.2, go_on.set).start()
    assert not model.close(0)
    assert ended[-1] == "cancelled"


def test_a_request_that_is_cancelled_while_it_waits_leaves_at_once(hybrid_model: Toy) -> None:
    """Also while all slots are taken by texts that change nothing for a long time."""
    with Generator(hybrid_model.runner(slots=1, max_length=2**17), ByteTokenizer(), "toy") as model:
        model.engine.ahead = True
        sampling = Sampling(max_tokens=2**16, ignore_end=True)
        begun, gone = threading.Event(), threading.Event()
        long = model.start([1], sampling, lambda piece: begun.set())
        begun.wait()
        waiting = model.start([1], sampling, lambda piece: gone.set())
        model.engine.cancel(waiting)
        assert gone.wait(10) and long.ended is None
        model.engine.cancel(long)


def test_a_model_that_gives_no_numbers_gives_no_text(
    hybrid_model: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of prompts with such logits; the others are answered."""
    runner = hybrid_model.runner()
    read = runner.read

    def broken(rows: list[int], tokens: list[list[int]], every: bool = False) -> torch.Tensor:
        logits = read(rows, tokens, every).clone()
        logits[[own[0] == 98 for own in tokens], ..., 5] = torch.nan
        return logits

    monkeypatch.setattr(runner, "read", broken)
    with Generator(runner, ByteTokenizer(), "toy") as model:
        expected = model.generate("a", max_tokens=3)
        for count in (3, 0):
            with pytest.raises(UserError, match="the model failed"):
                model.generate("b", max_tokens=count)
        assert "after its prompt (tokens: 1) and 0 of its own the model's logits are not numbers" in caplog.text
        assert len(expected.tokens) and model.engine.running == 0


@pytest.mark.parametrize("where", ["read", "copy", "step"])
def test_what_fails_in_the_model_is_told_to_all(hybrid_model: Toy, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    runner = hybrid_model.runner()

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(runner, where, broken)
    model = Generator(runner, ByteTokenizer(), "toy")
    with pytest.raises(Exception, match="failed"):
        model.generate("a", ignore_end=True, max_tokens=3)
    with pytest.raises(Closed):
        model.generate("a", max_tokens=3)
    assert isinstance(model.engine.failure, RuntimeError)


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ("", {}, "prompt: is empty"),
        ([300], {}, "prompt: has token 300; the vocabulary has those from 0 to 256"),
        ("a", {"max_tokens": 64}, "max_tokens: is 64, .* has 1 tokens; together they may be 64: ask for 63 at most"),
        ("a" * 64, {}, "prompt: has 64 tokens, and prompt and text together may have 64; shorten it, or"),
        ("a" * 65, {"max_tokens": 0}, "prompt: has 65 tokens"),
        ("a", {"top_q": 1}, "top_q: is no setting; there are echo, ignore_end"),
        ("a", {"temperature": -1, "top_p": 0}, "temperature: is -1; .*\ntop_p: is 0; "),
        ("a", {"stop_tokens": (-3,)}, "stop_tokens: has token -3"),
        (
            "a",
            {"top_q": 1, "logprobs": True},
            "top_q: is no setting; .*\nlogprobs: is True; it must be a",
        ),
        (None, {}, "prompt: is None; give a text or a list of tokens"),
        (5, {}, "prompt: is 5; give a text or a list of tokens"),
        (["a"], {}, r"prompt: is \['a'\]; give a text or a list of tokens"),
        ([True], {}, r"prompt: is \[True\]; give a text or a list of tokens"),
    ],
)
def test_wrong_requests_are_refused_at_once(model: Generator, prompt: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        model.stream(prompt, **settings)


def test_a_batch_is_a_list_of_prompts(model: Generator) -> None:
    with pytest.raises(ConfigError, match="prompts: is one text; give a list of them, or call generate"):
        model.generate_batch("abc")
    tokens = torch.tensor([97, 98])
    (text,) = model.generate_batch([tokens], max_tokens=4, temperature=0)  # type: ignore[list-item]
    assert text == model.generate("ab", max_tokens=4, temperature=0)


@pytest.mark.parametrize("ahead", [False, True])
def test_logits_that_become_no_numbers_end_that_text_alone(
    hybrid_model: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ahead: bool
) -> None:
    """While it is being made, with the step's tokens looked at before the next one and after."""
    runner = hybrid_model.runner()
    step, positions = runner.step, 0

    def broken(tokens: list[int] | torch.Tensor) -> torch.Tensor:
        nonlocal positions
        assert all(0 <= int(token) < 257 for token in tokens)
        logits = step(tokens).clone()
        positions += 1
        if positions == 3:
            logits[0, 5] = torch.nan
        return logits

    settings = Sampling(max_tokens=20, ignore_end=True, temperature=0)
    with Generator(hybrid_model.runner(), ByteTokenizer(), "toy") as model:
        expected = model.generate("b", max_tokens=20, ignore_end=True, temperature=0).text
    monkeypatch.setattr(runner, "step", broken)
    with Generator(runner, ByteTokenizer(), "toy") as model:
        model.engine.ahead = ahead
        texts = [Completion(reason=""), Completion(reason="")]
        jobs = [model.job([*prompt], settings, text.add) for prompt, text in zip((b"a", b"b"), texts, strict=True)]
        model.engine.submit(*jobs)
        assert model.close()
        assert [text.reason for text in texts] == ["error", "length"]
        assert texts[1].text == expected
        assert jobs[0].row.position < 20 and -1 not in jobs[0].row.seen
    assert "after its prompt (tokens: 1) and " in caplog.text


@pytest.mark.parametrize("where", ["on_token", "on_stop", "on_prompt", "on_end"])
def test_who_cannot_be_told_of_a_text_is_no_business_of_the_others(model: Generator, where: str) -> None:
    """Whatever the function raises that is called with tokens, with the prompt's scores, or at the end."""

    def raises(*_: Any) -> Any:
        raise RuntimeError("the reader is gone")

    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    sampling = Sampling(
        max_tokens=3, echo=True, logprobs=1, stop_tokens=tuple(range(257)) if where == "on_stop" else ()
    )
    told: dict[str, Any] = {"on_token": lambda _: False, "on_end": ended.put, where: raises}
    model.engine.submit(Job([1, 2, 3], sampling, **told))
    expected = model.generate("a", max_tokens=3, ignore_end=True)
    assert expected.reason == "length"
    if where != "on_end":
        assert ended.get(timeout=10) == "error"


@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_what_the_slots_take_at_once_does_not_wait(hybrid_model: Toy, waiting: int) -> None:
    """As many texts as there are slots are taken however few may wait, one call after the other."""
    for _ in range(10):
        with Generator(hybrid_model.runner(slots=4), ByteTokenizer(), "toy", max_waiting=waiting) as model:
            texts = model.generate_batch(["a"] * 4, max_tokens=2, ignore_end=True)
            assert len(texts) == 4


def test_a_text_that_closing_cuts_off_is_not_given_as_finished(hybrid_model: Toy) -> None:
    model = Generator(hybrid_model.runner(max_length=2**16), ByteTokenizer(), "toy")
    pieces = model.stream("a", max_tokens=2**15, ignore_end=True)
    next(pieces)
    threading.Thread(target=model.close, args=[0]).start()
    with pytest.raises(Closed, match="the text was not finished in time"):
        list(pieces)
