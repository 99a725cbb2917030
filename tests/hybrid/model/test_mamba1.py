"""The Mamba-1 layer against transformers' Mamba: on the CPU, an independent one in PyTorch."""

from pathlib import Path
from typing import Any

import torch

import hybrid.quiet  # noqa: F401
from hybrid.costs.pipeline import stage_pattern
from hybrid.model.build import build_model, transformer_config
from hybrid.training.distributed import start, stop
from tests import toy

SIZES = {"mamba_version": 1, "mamba_state_dim": 8, "mamba_dt_rank": 4, "mamba_expand": 2}


def test_logits_and_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    settings = toy.settings(tmp_path, model={"layer_pattern": "MMM", "init_std": 0.1, **SIZES})
    device = start(settings.parallel, None, seed=3).device
    try:
        pattern = stage_pattern(settings)
        ours = build_model(settings, transformer_config(settings, pattern), pattern)
        size = settings.model
        theirs: Any = MambaForCausalLM(
            MambaConfig(
                vocab_size=size.padded_vocab_size,
                hidden_size=size.hidden_size,
                num_hidden_layers=3,
                state_size=size.mamba_state_dim,
                time_step_rank=size.dt_rank,
                expand=size.mamba_expand,
                conv_kernel=size.mamba_conv_kernel,
                use_bias=False,
                use_conv_bias=True,
                tie_word_embeddings=False,
                layer_norm_epsilon=size.norm_epsilon,
                residual_in_fp32=False,
            )
        )
        theirs.to(device)
        theirs.load_state_dict(_their_state(ours))

        tokens = torch.randint(257, (2, 45), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(45, device=device).expand(2, -1)
        logits = ours(tokens.to(device), positions, None).cpu()
        expected = theirs(tokens.to(device)).logits.cpu()
        # float32 both; the scan in different chunks and orders. Logits are of size 1.
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        (logits * weights).sum().backward()
        (expected * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            gradient = gradients[_their_name(name)]
            assert parameter.grad is not None and gradient is not None
            apart = (parameter.grad - gradient).norm() / gradient.norm()
            assert apart < 1e-4, name
    finally:
        stop()


def _their_state(ours: Any) -> dict[str, Any]:
    state = {name: value for name, value in ours.state_dict().items() if "_extra_state" not in name}
    return {_their_name(name): value for name, value in state.items()}


def _their_name(name: str) -> str:
    for old, new in (
        ("mixer.in_proj.layer_norm_", "norm."),  # transformer-engine's linear holds the norm of its input
        ("embedding.word_embeddings.", "backbone.embeddings."),
        ("decoder.final_norm.", "backbone.norm_f."),
        ("decoder.", "backbone."),
        ("output_layer.", "lm_head."),
    ):
        name = name.replace(old, new)
    return name
