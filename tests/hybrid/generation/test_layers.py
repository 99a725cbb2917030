"""Reading a text in pieces, with carried state, is reading it whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hybrid.quiet  # noqa: F401
from hybrid.costs.pipeline import stage_pattern
from hybrid.generation.generate import Sampling, sample, stream_tokens
from hybrid.generation.layers import ModelState, advance
from hybrid.model.build import build_model, transformer_config
from hybrid.training.distributed import start, stop
from tests import toy

VOCABULARY = 257
EXPERTS = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 48, "moe_shared_expert_size": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "hybrid, rotary positions on half of each head": {"position_embedding": "rope", "rotary_percent": 0.5},
    "hybrid, learned positions, tied embeddings": {"position_embedding": "learned", "tie_embeddings": True},
    "pure Mamba": {"layer_pattern": "MM"},
    "Mamba-1": {"layer_pattern": "M-M*", "mamba_version": 1},
    "experts, and depths of multi-token prediction": {"layer_pattern": "MEM*/ME/ME", **EXPERTS},
    "transformer": {"layer_pattern": "*-*-", "activation": "swiglu", "normalization": "LayerNorm"},
    "squared ReLU with biases": {"activation": "squared_relu", "add_linear_bias": True},
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Any]:
    """A toy model with random weights, larger than at the start of a training so that it has opinions."""
    settings = toy.settings(tmp_path, model={"init_std": 0.2, **VARIANTS[request.param]})
    start(settings.parallel, None, seed=7)
    pattern = stage_pattern(settings)
    yield build_model(settings, transformer_config(settings, pattern), pattern).eval()
    stop()


def _whole(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, vocabulary) of the training forward pass."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def test_pieces_give_the_logits_of_the_whole(model: Any) -> None:
    # Two ways of computing the same float32 sums of some hundred terms; logits here are of size 1 to 10. The rounding
    # of one sum is about 1e-6 of it, and a few layers add up.
    tokens = torch.randint(VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(0))
    expected = _whole(model, tokens)
    assert expected.abs().max() > 0.5
    for pieces in ([50], [1] * 50, [20, 1, 1, 17, 11], [3, 47]):
        state, read = ModelState(), 0
        for length in pieces:
            logits = advance(model, tokens[:, read : read + length], state)
            read += length
            torch.testing.assert_close(logits, expected[:, read - 1].float(), atol=2e-4, rtol=1e-4)


def test_greedy_text_is_that_of_reading_everything_again_for_each_token(model: Any) -> None:
    prompt = list(b"def ")
    text = list(prompt)
    for _ in range(12):
        logits = _whole(model, torch.tensor([text]))[0, -1, :VOCABULARY]
        text.append(int(logits.argmax()))
    greedy = Sampling(temperature=0)
    assert list(stream_tokens(model, prompt, VOCABULARY, 12, greedy)) == text[len(prompt) :]


def test_the_same_seed_gives_the_same_text(model: Any) -> None:
    def text(seed: int) -> list[int]:
        return list(stream_tokens(model, [1, 2, 3], VOCABULARY, 20, Sampling(temperature=1.0, seed=seed)))

    assert text(5) == text(5)
    assert text(5) != text(6)


def test_sampling_follows_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)

    def counts(sampling: Sampling, draws: int = 4000) -> list[float]:
        drawn = [sample(shares.log(), sampling, generator) for _ in range(draws)]
        return [drawn.count(token) / draws for token in range(4)]

    # Four standard deviations of a share of 4000 draws are at most 0.032.
    assert counts(Sampling(temperature=1.0)) == pytest.approx(shares.tolist(), abs=0.032)
    assert counts(Sampling(temperature=1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.032)
    assert counts(Sampling(temperature=1.0, top_p=0.9)) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.032)
    squared = (shares**2 / (shares**2).sum()).tolist()
    assert counts(Sampling(temperature=0.5)) == pytest.approx(squared, abs=0.032)
    assert counts(Sampling(temperature=0), 5) == [1, 0, 0, 0]
