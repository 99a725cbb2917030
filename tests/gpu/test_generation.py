"""Generation on the GPU: graphs, kernels and two GPUs give the tokens of plain PyTorch in float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.data.tokenizer import ByteTokenizer
from hybrid.generation.generator import Generator
from hybrid.generation.runner import Room, Runner
from tests.hybrid.generation.toys import make_weights
from tests.recipes.test_generating import checkpoint, fails_without_the_other_rank, greedy
from tests.toy import MODEL

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
# Attention in the midst, so that what is read wrongly there is carried on.
MIXED = replace(MODEL, layer_pattern="M*-M*M-")
PROMPTS = ["a", "def ", "class Reader:\n", "x" * 37, "import os, sys\n", "q" * 70]


def _texts(device: str, dtype: torch.dtype, **room: Any) -> list[list[int]]:
    """Greedy tokens of all prompts, made together: prompts in several pieces, batches that grow and shrink."""
    runner = Runner(
        make_weights(MIXED, device=device, dtype=dtype), Room(slots=4, max_length=128, prefill_chunk=16, **room)
    )
    with Generator(runner, ByteTokenizer(), "toy") as model:
        texts = model.generate_batch(PROMPTS, temperature=0, max_tokens=24, ignore_end=True)
    return [[token.token for token in text.tokens] for text in texts]


def test_float32_gives_the_tokens_of_the_cpu() -> None:
    """The likeliest token is ahead by more than float32 rounds, for these weights: its margins are about 0.1."""
    expected = _texts("cpu", torch.float32)
    assert _texts("cuda", torch.float32, graphs=False) == expected
    assert _texts("cuda", torch.float32, graphs=True) == expected


def test_graphs_give_the_tokens_of_kernels_one_by_one() -> None:
    """The same kernels with the same batches: bit by bit, in bf16 too."""
    settings = {"batch_invariant": True}
    assert _texts("cuda", torch.bfloat16, graphs=True, **settings) == _texts(
        "cuda", torch.bfloat16, graphs=False, **settings
    )


def test_a_text_does_not_depend_on_its_batch_where_that_is_asked_for() -> None:
    weights = make_weights(MIXED, device="cuda", dtype=torch.bfloat16)
    runner = Runner(weights, Room(slots=4, max_length=128, prefill_chunk=16, batch_invariant=True))
    with Generator(runner, ByteTokenizer(), "toy") as model:
        settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 24, "ignore_end": True}
        together = [[t.token for t in text.tokens] for text in model.generate_batch(PROMPTS, **settings)]
        alone = [[t.token for t in model.generate(prompt, **settings).tokens] for prompt in PROMPTS]
    assert together == alone


@two_gpus
def test_two_gpus_give_the_text_of_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "hybrid")
    assert greedy(path, tensor_parallel=2, dtype="float32") == greedy(path, dtype="float32")


@two_gpus
def test_the_engine_fails_when_the_rank_of_another_gpu_dies(tmp_path: Path) -> None:
    """NCCL would wait for it for ever."""
    fails_without_the_other_rank(checkpoint(tmp_path, "hybrid"))
