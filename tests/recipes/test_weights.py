"""Runs that start from weights of other formats and leave some behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from converters import convert, summary
from hybrid.data.tokenizer import ByteTokenizer, load_tokenizer
from hybrid.errors import ConfigError, UserError
from recipes import apply, finetune, launch, local, tiny, weights
from recipes.settle import settings

SMALL = [
    *("model.hidden_size=32", "model.activation=squared_relu", "trainer.global_batch_size=2"),
    *("trainer.micro_batch_size=1", "trainer.max_steps=1", "data=mock", "data.sequence_length=32"),
    *("trainer.eval_interval=0", "trainer.eval_steps=1", "optimizer.warmup_samples=0"),
]
# A step so small that the weights stay what they were, to the last bit.
STILL = ["optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.weight_decay=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with `first`, exported to `first-hf`."""
    folder = tmp_path_factory.mktemp("runs")
    launch(small(folder, "name=first", f"checkpoint.export=hf:{folder / 'first-hf'}"))
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "HYBRID_JOB"):
        monkeypatch.delenv(name, raising=False)


def small(folder: Path, *overrides: str, tune: bool = False) -> Any:
    recipe = finetune(tiny()) if tune else tiny()
    return apply(recipe, [*SMALL, f"folder={folder}", *overrides])


def same(first: Path, second: Path) -> bool:
    """Whether two checkpoints have the same weights, but for rows that pad the vocabulary."""
    found = list(summary.diff(convert.open_checkpoint(first), convert.open_checkpoint(second)))
    return all("embedding" in one.name or "output" in one.name for one in found if one.largest is None) and not any(
        one.largest for one in found
    )


def test_a_run_exports_at_its_end(trained: Path) -> None:
    opened = convert.open_checkpoint(trained / "first-hf")
    assert opened.format == "hf" and opened.family == "nemotron_h"
    assert same(trained / "first", trained / "first-hf")


@pytest.mark.slow
def test_layers_that_only_training_knows(tmp_path: Path) -> None:
    """A run starts from weights of such a model; whatever else would read them says that it does not know them."""
    pattern = ["model.layer_pattern=M+D", "model.mla_query_rank=16", "model.mla_kv_rank=16"]
    launch(small(tmp_path, *pattern, "name=first"))
    launch(small(tmp_path, *pattern, *STILL, "name=second", "checkpoint=first"))
    before, after = (
        json.loads(line)["loss"]
        for name in ("first", "second")
        for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    )
    assert before != after
    with pytest.raises(UserError, match=r"decoder.layers.2 is sparse .* generation know the layers Mamba"):
        convert.open_checkpoint(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"model.layer_pattern: is 'MD', but the checkpoint"):
        launch(small(tmp_path, "model.layer_pattern=MD", *pattern[1:], "name=third", "checkpoint=first"))


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_a_run_starts_from_any_format(trained: Path, tmp_path: Path, form: str) -> None:
    source = trained / "first-hf"
    if form == "megatron":
        source = tmp_path / "legacy"
        convert.convert(trained / "first", source, "megatron", tensor=2, pipeline=2)
    launch(small(trained, *STILL, f"name=from-{form}", f"checkpoint={form}:{source}", tune=True))
    assert same(trained / f"from-{form}", source)
    assert "starts from the weights in" in (trained / f"from-{form}/log.txt").read_text()
    assert list((trained / weights.CACHE).glob(f"{'first-hf' if form == 'hf' else 'iter_0000001'}-*"))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_processes_start_from_one_conversion(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "legacy"
    recipe = small(trained, *STILL, "name=two", f"checkpoint=hf:{trained / 'first-hf'}", tune=True)
    recipe = apply(recipe, [f"checkpoint.export=megatron:{out}", "model.vocab_size_multiple=512"])
    assert launch(recipe, local(2)) == 0
    assert same(out, trained / "first-hf")


def test_what_came_with_a_model_goes_along(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of generation that it had, and the tokenizer that the run has read its data with."""
    (trained / "first-hf/generation_config.json").write_text('{"temperature": 0.5}')
    recipe = small(tmp_path, *STILL, f"checkpoint={trained / 'first-hf'}", f"checkpoint.export=hf:{tmp_path / 'out'}")
    recipe = apply(recipe, ["name=along"])
    launch(recipe)
    assert (tmp_path / "out/generation_config.json").read_text() == '{"temperature": 0.5}'
    assert load_tokenizer(str(tmp_path / "out")).unique_identifiers == ByteTokenizer().unique_identifiers
    assert weights.check(settings(recipe)) == []
    weights.export(settings(recipe))
    assert "is there already; nothing is exported" in capsys.readouterr().out


def test_weights_of_another_model_are_refused_before_anything_runs(trained: Path, tmp_path: Path) -> None:
    recipe = small(tmp_path, f"checkpoint=hf:{trained / 'first-hf'}", tune=True)
    recipe = apply(recipe, ["model.hidden_size=64", "model.activation=gelu", "model.vocab_size=100000"])
    with pytest.raises(ConfigError) as error:
        launch(recipe)
    said = {problem.place: problem.message for problem in error.value.problems}
    assert said.keys() >= {"model.hidden_size", "model.activation", "model.vocab_size"}
    assert said["model.hidden_size"].startswith("is 64, but the weights in ") and said["model.hidden_size"].endswith(
        "32"
    )
    assert not any(tmp_path.iterdir())


def test_weights_of_another_computation_are_refused_before_anything_runs(trained: Path, tmp_path: Path) -> None:
    convert.convert(trained / "first", tmp_path / "legacy", "megatron")
    (file,) = tmp_path.rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    content["args"].window_size = (128, 0)
    torch.save(content, file)
    with pytest.raises(ConfigError, match=r"has window_size=.* which our model does not compute"):
        launch(small(tmp_path / "runs", f"checkpoint=megatron:{tmp_path / 'legacy'}", tune=True))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.load=hf:nowhere", "hf:nowhere: does not exist"),
        ("checkpoint.load=hf:HERE", "is no checkpoint of the format hf"),
        ("checkpoint.load=nowhere", "neither a run nor a checkpoint"),
        ("checkpoint.export=nowhere", "is 'nowhere', which is not one of torch_dist:PATH, megatron:PATH, hf:PATH"),
        ("checkpoint.export=hf:HERE", "exists already"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "something").mkdir()
    recipe = small(tmp_path / "runs", override.replace("HERE", str(tmp_path)))
    with pytest.raises(ConfigError, match=message) as error:
        launch(recipe, dry_run=True)
    assert error.value.problems[0].place == override.split("=")[0]


def test_a_model_that_no_family_holds_is_not_trained_to_be_exported(tmp_path: Path) -> None:
    recipe = small(tmp_path, "checkpoint.export=hf:out", "model.position_embedding=learned")
    problems = weights.check(settings(recipe))
    assert {problem.place for problem in problems} == {"checkpoint.export"}
    assert "its positions are learned" in problems[0].message
