"""Packed sequences: each comes out as if its neighbours were not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid.quiet  # noqa: F401
from hybrid.costs.pipeline import stage_pattern
from hybrid.model.build import build_model, transformer_config
from hybrid.model.packing import Packed, pack
from hybrid.training.distributed import start, stop
from tests import toy
from tests.parity import LATENT, SPARSE

LENGTHS = [5, 1, 23, 40, 3]  # shorter than the convolution, longer than a chunk of the scan (16)
MODELS: dict[str, dict[str, Any]] = {
    "Mamba-2": {"layer_pattern": "M*-M"},
    "Mamba-1": {"layer_pattern": "M*-M", "mamba_version": 1, "mamba_state_dim": 8},
    "rotary positions": {"layer_pattern": "*-M", "position_embedding": "rope"},
    "learned positions": {"layer_pattern": "*-M", "position_embedding": "learned"},
    "latent attention": {"layer_pattern": "+-+", **LATENT},
    "sparse attention": {"layer_pattern": "D-D", **LATENT, **SPARSE},
    # The load-balancing loss is one over all tokens of a forward pass, and so left out.
    "experts": {"layer_pattern": "ME*", "num_experts": 4, "moe_ffn_hidden_size": 32, "moe_aux_loss_coeff": 0.0},
}


@contextmanager
def _model(folder: Path, **sections: Any) -> Iterator[Any]:
    settings = toy.settings(folder, **sections)
    device = start(settings.parallel, None, seed=5).device
    try:
        pattern = stage_pattern(settings)
        yield build_model(settings, transformer_config(settings, pattern), pattern).to(device)
    finally:
        stop()


def _batch() -> dict[str, torch.Tensor]:
    """Two rows of 36 positions, in which sequences of LENGTHS lie end to end."""
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    return {
        "tokens": torch.randint(257, (2, total // 2), generator=generator),
        "labels": torch.randint(257, (2, total // 2), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]).view(2, -1),
        "loss_mask": torch.ones(2, total // 2),
        "seq_idx": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).view(2, -1),
    }


def test_rows_are_laid_end_to_end_and_the_sequences_described() -> None:
    flat, packed = pack(_batch(), torch.device("cpu"))
    assert {key: value.shape for key, value in flat.items()} == dict.fromkeys(
        ("tokens", "labels", "position_ids", "loss_mask"), (1, 72)
    )
    assert packed is not None
    # A row ends within the fourth, which makes two of it.
    assert packed.lengths == [5, 1, 23, 7, 33, 3]
    assert packed.cu_seqlens_q.tolist() == [0, 5, 6, 29, 36, 69, 72] and packed.max_seqlen_q == 33
    assert packed.seq_idx.shape == (1, 72) and packed.seq_idx[0].bincount().tolist() == packed.lengths


def test_a_batch_of_whole_rows_stays_as_it_is() -> None:
    batch = {key: value for key, value in _batch().items() if key != "seq_idx"}
    same, packed = pack(batch, torch.device("cpu"))
    assert packed is None and all(torch.equal(same[key], batch[key]) for key in batch)


@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, "none") for kind in MODELS), ("Mamba-1", "full"), ("Mamba-2", "full")]
)
def test_each_sequence_comes_out_as_if_it_were_alone(kind: str, recompute: str, tmp_path: Path) -> None:
    sections = {"model": {"init_std": 0.1, **MODELS[kind]}, "trainer": {"recompute": recompute}}
    with _model(tmp_path, **sections) as model:
        tokens = torch.randint(257, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
        positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
        weights = torch.randn(1, sum(LENGTHS), 260, generator=torch.Generator().manual_seed(2))
        together = model(tokens, positions, None, packed_seq_params=Packed.of(LENGTHS))
        (together * weights).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        model.zero_grad()
        alone = [
            model(own, own_positions, None)
            for own, own_positions in zip(tokens.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
        ]
        for one, part in zip(alone, weights.split(LENGTHS, 1), strict=True):
            (one * part).sum().backward()

        # float32 both; products of other sizes, the scan in other chunks. Logits are of size 1.
        torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            apart = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
            assert apart < 1e-4, name


@pytest.mark.parametrize("pattern", ["M*-", "M*-/M*", "M*-/*-/*-"])
@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_learned_from_a_neighbour(pattern: str, version: int, tmp_path: Path) -> None:
    """The loss of one sequence, that of multi-token prediction included, has no gradient in the others' tokens."""
    lengths = [4, 7, 6]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    tokens = owner * 50 + torch.cat([torch.arange(length) for length in lengths]) + 1  # no token in two of them
    labels = tokens.roll(-1, 1)
    sections = {"layer_pattern": pattern, "mamba_version": version, "init_std": 0.1, "tie_embeddings": False}
    with _model(tmp_path, model=sections) as model:
        for chosen in range(3):
            model.zero_grad()
            mask = (owner == chosen).float()
            losses = model(
                tokens, tokens * 0, None, labels=labels, loss_mask=mask, packed_seq_params=Packed.of(lengths)
            )
            (losses * mask).sum().backward()
            gradient = model.embedding.word_embeddings.weight.grad.norm(dim=1)
            # The scan's backward pass sums up differences over a chunk: what cancels leaves a rounding error.
            reached = (gradient > 1e-6 * gradient.max()).nonzero().squeeze(1)
            # Multi-token prediction reads token 0 where its own sequence has no more.
            assert {token // 50 for token in reached.tolist() if token} == {chosen}
