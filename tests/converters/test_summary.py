"""What is said of a checkpoint, and how two are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, summary
from hybrid.config import ModelConfig

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]


def test_facts(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "megatron", tensor=2, pipeline=2)
    known = summary.facts(convert.open_checkpoint(tmp_path / "a"))
    assert known["format"] == "megatron" and known["iteration"] == 100
    assert known["layout"] == {"tensor": 2, "pipeline": 2, "virtual": 1, "expert": 1}
    assert known["layer_pattern"] == "M-|M*-"
    assert ModelConfig(**known["model"]).hidden_size == 32
    assert known["parameters"] == sum(t.numel() for _, t in convert.stream(tmp_path / "a"))
    assert known["bytes_by_dtype"] == {"bfloat16": 2 * known["parameters"]}
    assert known["files"] == 4 and not known["missing"] and not known["unknown"] and not known["optimizer"]


def test_text_has_a_line_for_each_fact(saved: Saved) -> None:
    text = summary.text(convert.open_checkpoint(saved("hybrid")[0]))
    assert "format         Megatron legacy\n" in text
    assert "layer pattern  M-M*-  (5 layers: 2 M, 1 *, 2 -)\n" in text
    assert "Mamba-2 16 heads x 4, state 4, 8 groups" in text
    assert "iteration      100\n" in text


def test_no_weights_are_read(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.streams import Reader

    source, _ = saved("hybrid")
    convert.convert(source, tmp_path / "torch_dist", "torch_dist")
    convert.convert(source, tmp_path / "hf", "hf")
    monkeypatch.setattr(Reader, "_fill", lambda *_: pytest.fail("weights were read"))
    for path in (source, tmp_path / "torch_dist", tmp_path / "hf"):
        summary.text(convert.open_checkpoint(path))


def test_a_checkpoint_is_its_own_equal_in_every_format(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("hybrid")
    convert.convert(source, tmp_path / "a", "torch_dist")
    convert.convert(source, tmp_path / "b", "megatron", tensor=2, pipeline=2)
    convert.convert(source, tmp_path / "c", "hf")
    first = convert.open_checkpoint(source)
    assert not list(summary.diff(first, convert.open_checkpoint(tmp_path / "a")))
    for name in ("b", "c"):  # the vocabulary has other rows there
        assert not list(summary.diff(first, convert.open_checkpoint(tmp_path / name)))


def test_differences_are_named(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("hybrid")
    path = source / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.0.mixer.D"][3] += 2
    content["model"]["decoder.layers.2.mixer.dt_bias"] = content["model"]["decoder.layers.2.mixer.dt_bias"].float()
    content["args"].norm_epsilon = 1e-6
    (tmp_path / "b/iter_0000100/mp_rank_00").mkdir(parents=True)
    torch.save(content, tmp_path / "b/iter_0000100/mp_rank_00/model_optim_rng.pt")
    found = {
        difference.name: str(difference)
        for difference in summary.diff(
            convert.open_checkpoint(source), convert.open_checkpoint(tmp_path / "b/iter_0000100")
        )
    }
    assert found.keys() == {"model.norm_epsilon", "decoder.layers.0.mixer.D", "decoder.layers.2.mixer.dt_bias"}
    assert found["model.norm_epsilon"] == "model.norm_epsilon: 1e-05 / 1e-06"
    assert "values differ by up to 2 " in found["decoder.layers.0.mixer.D"]
    assert found["decoder.layers.2.mixer.dt_bias"].endswith("bfloat16 / float32")


def test_the_recipe_of_a_checkpoint(saved: Saved, tmp_path: Path) -> None:
    """What `inspect --format yaml` prints is a recipe that the other verbs take."""
    from recipes import planning, resolve
    from recipes.settle import settle

    convert.convert(saved("hybrid")[0], tmp_path / "a", "megatron", tensor=2, pipeline=2)
    opened = convert.open_checkpoint(tmp_path / "a")
    (tmp_path / "a.yaml").write_text(summary.recipe(opened))
    recipe: Any = settle(resolve(f"@{tmp_path / 'a.yaml'}"))
    assert recipe.name == "a" and recipe.parallel.tensor == 2
    assert recipe.model.layer_pattern == "M-|M*-" and recipe.model.vocab_size == 250
    recipe.model.vocab_size = 257  # the byte tokenizer has more tokens than this model
    assert [problem.place for problem in planning.plan(recipe).problems] == ["trainer.max_steps"]
