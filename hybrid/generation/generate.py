"""Text from a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hybrid.quiet  # noqa: F401

# isort: split
import torch
from torch import Tensor

from hybrid import settings_file
from hybrid.config import ParallelConfig, Settings
from hybrid.costs.pipeline import stage_pattern
from hybrid.data.tokenizer import load_tokenizer
from hybrid.errors import ConfigError, Problem
from hybrid.generation.layers import ModelState, advance
from hybrid.model.build import build_model, transformer_config
from hybrid.training import checkpoint, folder
from hybrid.training.distributed import start, stop


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave nothing out."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.temperature < 0:
            problems.append(
                Problem("temperature", f"is {self.temperature}; it must be 0 (the likeliest token) or more")
            )
        if self.top_k < 0:
            problems.append(Problem("top_k", f"is {self.top_k}; it must be 0 (no limit) or more"))
        if not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", f"is {self.top_p}; it must be above 0 and at most 1 (no limit)"))
        if problems:
            raise ConfigError(problems)


def stream_text(
    run_or_checkpoint: str,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Load a checkpoint and give the text that follows `prompt`, piece by piece; ends at the end-of-document token.

    Raises ConfigError for a checkpoint that is not there or values that make no sense.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    if not prompt:
        raise ConfigError(Problem("prompt", "is empty; give the text to go on from"))
    if max_tokens < 1:
        raise ConfigError(Problem("max_tokens", f"is {max_tokens}; it must be at least 1"))
    path = folder.find_checkpoint(run_or_checkpoint)
    settings = settings_file.read(path)
    tokenizer = load_tokenizer(settings.data.tokenizer)
    start(ParallelConfig(), None, settings.trainer.seed)
    try:
        model = load_model(path, settings)
        decoder = tokenizer.stream()
        for token in stream_tokens(model, tokenizer.encode(prompt), settings.model.vocab_size, max_tokens, sampling):
            if token == tokenizer.eod:
                break
            yield decoder.push(token)
        yield decoder.finish()
    finally:
        stop()


def load_model(path: Any, settings: Settings) -> Any:
    """The whole model of a checkpoint of any layout, in this process, ready to generate."""
    settings.parallel = ParallelConfig()
    pattern = stage_pattern(settings)
    config = transformer_config(settings, pattern)
    model: Any = build_model(settings, config, pattern)
    checkpoint.load_weights(path, [model])
    return model.eval()


def stream_tokens(model: Any, prompt: list[int], vocab_size: int, max_tokens: int, sampling: Sampling) -> Iterator[int]:
    """The tokens that follow `prompt`: one pass over the prompt, then one position at a time on the carried state."""
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu")
    if sampling.seed is not None:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()
    state = ModelState()
    logits = advance(model, torch.tensor([prompt], device=device), state)
    for _ in range(max_tokens):
        token = sample(logits[0, :vocab_size].cpu(), sampling, generator)
        yield token
        logits = advance(model, torch.tensor([[token]], device=device), state)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token from logits (vocabulary)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        # A token stays while those before it have less than top_p: the first one always does.
        outside = shares.cumsum(-1) - shares >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(0, order, outside), -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
