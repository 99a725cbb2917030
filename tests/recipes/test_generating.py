"""Checkpoints of several formats, opened to generate; and one model shared by two processes."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from converters import convert
from hybrid.errors import ConfigError, UserError
from hybrid.generation.sampling import Sampling
from recipes import generating, open_generator
from tests.converters.conftest import random_weights, save_legacy, small_model

VOCABULARY = {"vocab_size": 257, "vocab_size_multiple": 8}


def checkpoint(folder: Path, kind: str) -> Path:
    """A legacy checkpoint in float32, with weights of a size that leaves opinions and no infinities."""
    model = small_model(kind, **VOCABULARY)
    weights = {name: tensor * 0.2 for name, tensor in random_weights(model, dtype=torch.float32).items()}
    return save_legacy(folder / kind, model, weights)


def greedy(path: Any, **options: Any) -> list[int]:
    with open_generator(path, tokenizer="byte", slots=4, max_length=64, **options) as model:
        text = model.generate("def ", temperature=0, max_tokens=12, ignore_end=True)
    return [token.token for token in text.tokens]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["hybrid", "swiglu"])
def test_two_processes_give_the_text_of_one(tmp_path: Path, kind: str) -> None:
    path = checkpoint(tmp_path, kind)
    assert greedy(path, tensor_parallel=2) == greedy(path)


def test_weights_of_another_computation_are_refused(tmp_path: Path) -> None:
    model = small_model("hybrid", **VOCABULARY)
    path = save_legacy(tmp_path / "a", model, random_weights(model), position_embedding_type="yarn")
    with pytest.raises(ConfigError, match=r"has position_embedding_type=yarn .* which our model does not compute"):
        open_generator(path, tokenizer="byte")


def _dies(*_: Any) -> None:
    sys.exit(3)


def test_a_rank_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, "hybrid")
    monkeypatch.setattr(generating, "_follow", _dies)
    with pytest.raises(UserError, match=r"^rank 1 of 2 has ended \(exit code 3\) before the model was loaded"):
        open_generator(path, tokenizer="byte", tensor_parallel=2)


def fails_without_the_other_rank(path: Path) -> None:
    """Kill rank 1 in the midst of a text: it ends with an error, and the model can be closed."""
    before = set(multiprocessing.active_children())  # those of the test before may still be ending
    with open_generator(path, tokenizer="byte", slots=4, max_length=4096, prefill_chunk=16, tensor_parallel=2) as model:
        text = model.stream("def ", max_tokens=4000, ignore_end=True)
        next(text)
        (rank,) = set(multiprocessing.active_children()) - before
        rank.kill()
        with pytest.raises(UserError, match="failed"):
            list(text)
    assert model.engine.failure is not None


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_engine_fails_when_a_rank_dies(tmp_path: Path) -> None:
    fails_without_the_other_rank(checkpoint(tmp_path, "hybrid"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_no_rank_outlives_the_first(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "hybrid")
    opened = f"open_generator({str(path)!r}, tokenizer='byte', slots=4, max_length=64, tensor_parallel=2)"
    script = f"import time; from recipes import open_generator; m = {opened}; print(1, flush=True); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert first.stdout is not None and first.stdout.readline() == b"1\n"
    others = psutil.Process(first.pid).children(recursive=True)
    assert others
    first.kill()
    first.wait()
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive


def test_every_format_gives_the_same_text(tmp_path: Path) -> None:
    legacy = checkpoint(tmp_path, "hybrid")
    convert.convert(legacy, tmp_path / "dist", "torch_dist")
    convert.convert(legacy, tmp_path / "hf", "hf", family="nemotron_h")
    expected = greedy(legacy)
    assert greedy(tmp_path / "dist") == expected
    assert greedy(tmp_path / "hf") == expected


def test_threads_are_the_engines_as_far_as_it_has_work_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that loads with several would keep OpenMP's pool, and slow the engine down threefold."""
    loaded_with, made_with = [], []
    load = generating._weights
    monkeypatch.setattr(generating, "_weights", lambda *a: loaded_with.append(torch.get_num_threads()) or load(*a))
    path, before = checkpoint(tmp_path, "hybrid"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for weights_a_thread in (1, 2**30):
            monkeypatch.setattr(generating, "_WEIGHTS_A_THREAD", weights_a_thread)
            with open_generator(path, tokenizer="byte", slots=1, max_length=64) as model:
                job = model.start([1], Sampling(max_tokens=1), lambda _: made_with.append(torch.get_num_threads()))
                while not job.row.position:
                    time.sleep(0.01)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert loaded_with == [1, 1]
    assert (made_with[0], made_with[-1]) == (2, 1)


def test_what_cannot_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, "hybrid")
    with pytest.raises(ConfigError, match="has no tokenizer beside it; name a file or folder, or 'byte'"):
        open_generator(path)
    with pytest.raises(ConfigError, match=r"slots: is 0; .*\ndtype: is 'int4', which is not one of float32"):
        open_generator(path, slots=0, dtype="int4")
    monkeypatch.setattr(generating, "_weights", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(generating, "_follow", lambda *_: pytest.fail("a rank was started"))
    with pytest.raises(ConfigError, match="--tensor-parallel"):
        open_generator(path, tokenizer="byte", tensor_parallel=3)
    with pytest.raises(ConfigError, match="--chat-template: line 2 is no Jinja: "):
        open_generator(path, tokenizer="byte", chat_template="{% for m in messages %}\n{{ m[ }}")
    with pytest.raises(UserError, match=r"needs .* GiB of weights as float32, .* GiB for 32 sequences of 1000000000"):
        open_generator(path, tokenizer="byte", max_length=10**9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [
        ("hybrid", "nemotron_h", "NemotronHForCausalLM"),
        ("mamba2", "mamba2", "Mamba2ForCausalLM"),
        ("mamba1", "mamba", "MambaForCausalLM"),
    ],
)
def test_greedy_text_is_transformers(tmp_path: Path, kind: str, family: str, name: str) -> None:
    import transformers

    path = checkpoint(tmp_path, kind)
    convert.convert(path, tmp_path / "hf", "hf", family=family)
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "hf", dtype=torch.float32)
    prompt = torch.tensor([list(b"def ")])
    made = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=None
    )
    assert greedy(tmp_path / "hf") == made[0, 4:].tolist()
