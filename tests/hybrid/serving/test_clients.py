"""The server as real clients use it: OpenAI's package, and plain HTTP."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.hybrid.serving.conftest import Served


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_completions_with_log_probabilities(client: openai.OpenAI, served: Served) -> None:
    given = client.completions.create(
        model="toy", prompt=["def ", "ab"], max_tokens=6, temperature=0, logprobs=3, echo=True, n=2
    )
    assert len(given.choices) == 4 and [choice.index for choice in given.choices] == [0, 1, 2, 3]
    first = given.choices[0]
    assert first.text.startswith("def ") and first.text == given.choices[1].text
    assert first.logprobs is not None and first.logprobs.token_logprobs is not None
    assert first.logprobs.token_logprobs[0] is None and len(first.logprobs.token_logprobs) == 10
    own = served.model.generate("def ", max_tokens=6, temperature=0, logprobs=3, echo=True)
    assert first.logprobs.token_logprobs == [token.logprob for token in own.tokens]
    assert first.logprobs.text_offset == [0, 1, 2, 3, *first.logprobs.text_offset[4:]]
    assert given.usage is not None
    assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (6, 24)


def test_a_stream_gives_the_text_of_the_whole(client: openai.OpenAI) -> None:
    settings = {"model": "toy", "prompt": "abc", "max_tokens": 40, "seed": 7, "temperature": 1.0}
    whole = client.completions.create(**settings).choices[0]  # type: ignore[arg-type]
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))  # type: ignore
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.text
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason
    assert chunks[-1].usage.completion_tokens == 40


def test_chats(client: openai.OpenAI, served: Served) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    settings = {"model": "toy", "messages": messages, "max_tokens": 8, "temperature": 0}
    given = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2).choices[0]  # type: ignore
    expected = served.model.generate("system: short\nuser: hi\nassistant: ", temperature=0, max_tokens=8)
    assert given.message.content == expected.text
    assert given.logprobs is not None and len(given.logprobs.content[0].top_logprobs) == 2
    chunks = list(client.chat.completions.create(**settings, stream=True))  # type: ignore[arg-type]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text


def test_bytes_of_characters_have_log_probabilities_of_their_own(client: openai.OpenAI) -> None:
    asked = {"model": "toy", "prompt": "é日😀", "max_tokens": 6, "temperature": 0, "logprobs": 1, "echo": True}
    whole = client.completions.create(**asked).choices[0].logprobs  # type: ignore[call-overload]
    assert whole.text_offset[:10] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3] and whole.tokens[4] == "bytes:\\xa5"
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]  # type: ignore
    assert [offset for scores in streamed for offset in scores.text_offset] == whole.text_offset
    messages = [{"role": "user", "content": "a"}]
    answer = client.chat.completions.create(model="toy", messages=messages, max_tokens=60, logprobs=True, seed=1)  # type: ignore
    made = [token.bytes for token in answer.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert all(len(each) == 1 for each in made if each) and any(each and each[0] > 127 for each in made)
    text = bytes(byte for each in made for byte in each or []).decode(errors="replace")
    assert text == answer.choices[0].message.content


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


def test_failures_are_those_of_the_package(client: openai.OpenAI, guarded: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="toy", prompt="a", temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; there is 'toy'"):
        client.completions.create(model="other", prompt="a")
    stranger = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        stranger.models.list()
    known = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret", max_retries=0)
    assert known.completions.create(model="toy", prompt="a", max_tokens=1).choices


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "no JSON"),
        ("[]", "the body: must be a JSON object"),
        ("", "the body: Field required"),
        ({}, "prompt: Field required"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": []}, "prompt: is empty"),
        ({"prompt": "a", "max_tokens": 999999}, "together they may be 16384"),
        ({"prompt": [300]}, "has token 300; the vocabulary has those from 0 to 256"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "top_p": 0}, "top_p: Input should be greater than 0"),
        ({"prompt": "a", "n": 4, "best_of": 5}, "best_of: is 5 and n is 4"),
        ({"prompt": ["a"] * 100, "n": 2}, "asks for 200 texts"),
        ({"prompt": "a", "presence_penalty": 1.0}, "presence_penalty: is not done here; leave it out, or give 0"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias: is not done here; leave it out, or give {}"),
        ({"prompt": "a", "stop_token_ids": [257]}, "stop_token_ids: has token 257"),
        ({"prompt": [97] * 20000, "n": 100}, "100 texts are asked for at once, and there is room for 4"),
        ({"prompt": [97] * 20000, "n": 8}, "prompt: has 20000 tokens, and prompt and text together may have 16384"),
        ({"prompt": "a", "tools": []}, "tools: there is no such field"),
        ({"prompt": "a", "sufix": "b"}, "sufix: there is no such field; did you mean suffix?"),
        ({"prompt": "a", "suffix": "b"}, "suffix: must be null"),
        ({"prompt": "a", "body": 1}, "body: there is no such field"),
        (
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options: says nothing without stream: true",
        ),
        ({"prompt": "a", "stop": [""]}, "stop: "),
        ('{"prompt": "\\ud800"}', "holds half of a character"),
        ('{"prompt": "a", "stop": "\\udc80"}', "holds half of a character"),
    ],
)
def test_bad_input_is_refused_in_openais_form(served: Served, body: object, says: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    with served.client() as http:
        answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_a_refusal_has_the_names_of_the_route_and_none_of_pythons(served: Served) -> None:
    with served.client() as http:

        def refused(body: object, route: str = "/v1/completions") -> str:
            answer = http.post(route, json=body)
            assert answer.status_code == 400
            return answer.json()["error"]["message"]

        # There are such fields, but in chats.
        assert refused({"prompt": "a", "messages": 1}) == "messages: there is no such field"
        assert refused({"prompt": "a", "top_logprobs": 1}) == (
            "top_logprobs: there is no such field; did you mean logprobs?"
        )
        assert refused({"prompt": 5}) == "prompt: Input should be a valid string\nprompt: Input should be a valid list"
        assert refused({"prompt": [{}]}).splitlines()[1] == "prompt.0: Input should be a valid integer"
        for content in (5, [{"type": "image_url"}]):
            said = refused({"messages": [{"role": "user", "content": content}]}, "/v1/chat/completions")
            assert "messages.0.content" in said and not set("[(_") & set(said.replace("image_url", ""))


def test_chats_refuse_what_says_nothing_or_two_things(served: Served) -> None:
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with served.client() as http:
        for more, says in [
            ({"top_logprobs": 2}, "top_logprobs: says nothing without logprobs: true"),
            ({"stream_options": {"include_usage": True}}, "stream_options: says nothing without stream: true"),
            ({"max_completion_tokens": 3}, "max_completion_tokens: is 3 and max_tokens is 2; give one of them"),
        ]:
            answer = http.post("/v1/chat/completions", json={**asked, **more})
            assert answer.status_code == 400 and says in answer.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json={**asked, "max_completion_tokens": 2}).status_code == 200


def test_a_chat_that_is_too_long_is_told_so_by_its_own_names(served: Served) -> None:
    with served.client() as http:

        def refused(count: int, **more: int) -> tuple[str, str]:
            asked = {"messages": [{"role": "user", "content": "a" * count}], **more}
            answer = http.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 400
            return answer.json()["error"]["param"], answer.json()["error"]["message"]

        param, message = refused(17000)
        assert param == "messages" and message.startswith("messages: has 17018 tokens, and prompt and text together")
        for name in ("max_tokens", "max_completion_tokens"):
            param, message = refused(1, **{name: 17000})
            assert param == name and message.endswith(
                "ask for 16365 at most, or open the model with a greater max_length"
            )


def test_megatrons_clients(served: Served) -> None:
    with served.client() as http:
        body = {"prompts": ["def ", "x"], "tokens_to_generate": 5, "top_k": 1, "logprobs": True}
        answer = http.put("/api", json=body).json()
        own = served.model.generate("def ", max_tokens=5, temperature=0)
        assert answer["text"][0] == "def " + own.text
        assert len(answer["tokens"][0]) == 9 and len(answer["logprobs"][0]) == 8 and len(answer["segments"][1]) == 6
        seeded = {"prompts": ["a"], "tokens_to_generate": 20, "random_seed": 4, "stop_token": 32}
        assert http.put("/api", json=seeded).json() == http.put("/api", json=seeded).json()
        for wrong, says in [
            ({}, "prompts: Field required"),
            ({"prompts": []}, "prompts: List should have at least 1"),
            ({"prompts": ["a"], "beam_width": 3}, "beam_width: is 3; this server takes null only"),
            ({"prompts": ["a"], "top_k": 3, "top_p": 0.5}, "top_p: cannot be set together with top_k"),
            ({"prompts": ["a"], "top_p_decay": 0.5}, "top_p_decay: is 0.5"),
            ({"prompts": ["a"], "max_len": 5}, "max_len: there is no such field"),
            ({"prompts": [""]}, "prompts: is empty"),
            ({"prompts": ["a"], "tokens_to_generate": 17000}, "tokens_to_generate: is 17000, and the prompt has 1"),
            ({"prompts": ["a"], "stop_token": 300}, "stop_token: has token 300"),
        ]:
            refused = http.put("/api", json=wrong)
            assert refused.status_code == 400 and says in refused.json()
        half = http.put("/api", content='{"prompts": ["\\udc80"]}', headers={"content-type": "application/json"})
        assert half.status_code == 400 and "half of a character" in half.json()


def test_a_prompt_stands_once_before_its_text_even_if_the_tokenizer_changes_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that writes all in lower case."""
    encode = served.model.tokenizer.encode
    monkeypatch.setattr(served.model.tokenizer, "encode", lambda text: encode(text.lower()))
    asked = {"prompts": ["ABC"], "tokens_to_generate": 3, "top_k": 1}
    with served.client() as http:
        for more in ({}, {"add_BOS": True}):
            answers = [http.put("/api", json={**asked, **more, "logprobs": scored}).json() for scored in (False, True)]
            assert answers[0]["text"] == answers[1]["text"] and answers[0]["tokens"] == answers[1]["tokens"]
            text = answers[0]["text"][0]
            assert text.startswith("ABC") and "abc" not in text.lower()[3:]


def test_others_are_answered_while_a_long_prompt_is_taken_apart(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, go_on = served.model.tokenizer.encode, threading.Event(), threading.Event()

    def slow(text: str) -> list[int]:
        begun.set()
        assert go_on.wait(30)
        return encode(text)

    monkeypatch.setattr(served.model.tokenizer, "encode", slow)
    with served.client() as http, ThreadPoolExecutor() as pool:
        long = pool.submit(http.post, "/v1/completions", json={"prompt": "a" * 100_000})
        assert begun.wait(30)
        assert http.get("/health", timeout=10).status_code == 200
        go_on.set()
        assert "prompt: has 100000 tokens" in long.result().json()["error"]["message"]


def test_half_a_character_as_the_models_name_is_refused_on_all_routes(served: Served) -> None:
    with served.client(headers={"content-type": "application/json"}) as http:
        for route, rest in [
            ("/v1/completions", '"prompt": "a"'),
            ("/v1/chat/completions", '"messages": []'),
            ("/tokenize", '"prompt": "a"'),
            ("/detokenize", '"tokens": [97]'),
        ]:
            answer = http.post(route, content='{"model": "\\ud800", ' + rest + "}")
            assert answer.status_code == 400 and "half of a character" in answer.text


def test_a_body_that_is_not_called_json_is_refused(served: Served) -> None:
    with served.client() as http:
        answer = http.post("/v1/completions", content='{"prompt": "a"}')
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == "content-type is missing; send application/json"
        assert "form-urlencoded'; send application/json" in http.post("/v1/completions", data={"prompt": "a"}).text


def test_long_bodies_and_a_full_queue_are_refused(guarded: Served) -> None:
    key = {"authorization": "Bearer secret"}
    with guarded.client(headers=key) as http:
        assert http.post("/v1/completions", json={"prompt": "a" * 3000}).status_code == 413
        pieces = (b'{"prompt": "' + b"a" * 500 for _ in range(10))
        assert http.post("/v1/completions", content=pieces).status_code == 413
        never = http.post("/v1/completions", json={"prompt": ["a"] * 60, "max_tokens": 5})
        assert never.status_code == 400
        assert "there is room for 1 and for 8 that wait; ask for fewer" in never.json()["error"]["message"]
        running = {"prompt": "a", "max_tokens": 16000, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=running) as answer:
            lines = answer.iter_lines()  # kept: httpx hangs up with the iterator
            next(lines)
            full = http.post("/v1/completions", json={"prompt": ["a"] * 9, "max_tokens": 5})
        assert full.status_code == 429 and full.headers["retry-after"]
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert http.get("/health").json() == {"status": "ok", "model": "toy"}
    counts = {status: _count(guarded, f'hybrid_refused_total{{status="{status}"}}', key) for status in (401, 413)}
    assert counts[413] == 2
    with guarded.client() as stranger:
        assert stranger.get("/metrics").status_code == 401
        assert _count(guarded, 'hybrid_refused_total{status="401"}', key) == counts[401] + 1
        assert stranger.get("/").status_code == 200
        assert stranger.put("/api", json={}).json().startswith("the API key")


def test_hanging_up_frees_the_slot(served: Served) -> None:
    long = {"prompt": "a", "max_tokens": 16000, "ignore_eos": True}
    with served.client() as http:
        for _ in range(6):  # more than there are slots
            with http.stream("POST", "/v1/completions", json={**long, "stream": True}) as answer:
                next(answer.iter_lines())
        assert served.idle()
    for _ in range(6):
        with pytest.raises(Exception, match="timed out"), served.client() as http:
            http.post("/v1/completions", json=long, timeout=0.15)
    assert served.idle()


def test_metrics_count(served: Served) -> None:
    with served.client() as http:
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4, "ignore_eos": True})
        text = http.get("/metrics").text
    assert 'hybrid_requests_total{reason="length",route="completions"}' in text
    assert "hybrid_running 0.0" in text and "hybrid_slots 4.0" in text
    assert "hybrid_time_to_first_token_seconds_bucket" in text


def _count(served: Served, line: str, headers: dict[str, str] | None = None) -> float:
    with served.client(headers=headers) as http:
        found = [each.split()[1] for each in http.get("/metrics").text.splitlines() if each.startswith(line)]
    return float(found[0]) if found else 0.0


def test_metrics_count_who_hangs_up_and_no_echo(served: Served) -> None:
    cancelled = 'hybrid_requests_total{reason="cancelled",route="completions"}'
    before = _count(served, cancelled)
    body = {"prompt": "a", "max_tokens": 16000, "ignore_eos": True, "stream": True}
    with served.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    assert served.idle() and _count(served, cancelled) == before + 1
    names = ("hybrid_generated_tokens_total", "hybrid_time_to_first_token_seconds_count")
    before_echo = [_count(served, name) for name in names]
    with served.client() as http:
        http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1})
    assert [_count(served, name) for name in names] == before_echo


def test_metrics_count_tokens_as_the_usage_does(served: Served) -> None:
    """With the token that ends a text."""
    name = "hybrid_generated_tokens_total"
    with served.client() as http:
        for more in ({}, {"logprobs": 1}, {"logprobs": 1, "echo": True}):
            before = _count(served, name)
            asked = {"prompt": "a", "max_tokens": 5, "stop_token_ids": list(range(128)), "seed": 3, **more}
            made = http.post("/v1/completions", json=asked).json()["usage"]["completion_tokens"]
            assert made and _count(served, name) == before + made


def test_many_clients_at_once(served: Served) -> None:
    """Eight threads on four slots, each with its own seed: every text is the one that it is alone."""
    alone = [served.model.generate("x", seed=i, temperature=1.0, max_tokens=30).text for i in range(8)]
    texts: dict[int, str] = {}

    def ask(i: int) -> None:
        with served.client() as http:
            body = {"prompt": "x", "seed": i, "max_tokens": 30}
            texts[i] = http.post("/v1/completions", json=body).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[i] for i in range(8)] == alone
