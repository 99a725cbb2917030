"""Showing, tracing and comparing recipes."""

from pathlib import Path

import fiddle as fdl
import pytest

from hybrid.config import DataConfig, ModelConfig
from hybrid.run import pretrain
from recipes import apply, config, hybrid_8b, hybrid_800m, origins, partial, python, resolve, show, shrink, tiny


def origin(recipe: fdl.Partial, place: str) -> str:
    return {row.place: row.origin for row in show.rows(recipe)}[place]


def test_a_value_of_a_recipe_comes_from_its_own_line() -> None:
    place = origin(hybrid_8b(), "model.attention_ratio")
    file, line = place.split(":")
    assert file == "recipes/seed.py"
    assert "attention_ratio=0.08" in Path(file).read_text().splitlines()[int(line) - 1]


def test_a_value_set_later_comes_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = hybrid_8b()
    recipe.model.hidden_size = 2048
    monkeypatch.chdir(Path(__file__).parent)
    file, line = origin(recipe, "model.hidden_size").split(":")
    assert file == "tests/recipes/test_show.py"
    assert "recipe.model.hidden_size = 2048" in Path(__file__).read_text().splitlines()[int(line) - 1]


def test_overrides_parts_files_and_defaults_are_named(tmp_path: Path) -> None:
    recipe = apply(hybrid_8b(), ["model.hidden_size=2048", "data=mock", "model.layer_pattern=M-"])
    assert origin(recipe, "model.hidden_size") == "override model.hidden_size=2048"
    assert origin(recipe, "data.source").endswith("by override data=mock")
    assert origin(recipe, "data.source").startswith("recipes/parts.py:")
    assert origin(recipe, "model.num_layers") == "superseded by model.layer_pattern"
    assert origin(recipe, "model.norm_epsilon") == "default"
    assert origin(recipe, "data.split") == "default"
    (tmp_path / "a.yaml").write_text("name: a\ntrainer:\n  max_steps: 3\nmodel:\n  layer_pattern: M\n")
    assert origin(resolve(f"@{tmp_path}/a.yaml"), "trainer.max_steps") == f"{tmp_path}/a.yaml:3"


def test_every_value_that_is_no_default_has_an_origin() -> None:
    for recipe in (hybrid_8b(), shrink(hybrid_8b()), apply(tiny(), ["model=hybrid_8b"])):
        for row in show.rows(recipe):
            assert row.is_default or row.origin != "default", row.place


def test_source_that_cannot_be_read_gives_the_line_that_fiddle_recorded() -> None:
    namespace: dict = {}
    exec(compile("def make(config, cls):\n    return config(cls, hidden_size=3)\n", "<cell 1>", "exec"), namespace)
    assert origins.origin(namespace["make"](config, ModelConfig), "hidden_size") == "<cell 1>:2"


def test_plain_fiddle_works_as_well() -> None:
    recipe = fdl.Partial(pretrain, name="mine", model=fdl.Config(ModelConfig, layer_pattern="M*"))
    recipe.data = fdl.Config(DataConfig, sequence_length=64)
    assert "sequence_length         64" in show.tree(recipe)
    assert "num_layers              None -> 2" in show.tree(recipe)


def test_a_difference_is_a_line_and_equal_recipes_have_none() -> None:
    assert show.diff_text(tiny(), tiny()) == "no difference"
    lines = show.diff_text(hybrid_800m(), hybrid_8b()).splitlines()
    assert "model.hidden_size          1024 => 4096" in lines
    assert "parallel.sequence          False => True" in lines
    assert len(lines) == 8
    assert show.diff_text(tiny(), resolve("finetune(tiny)")).splitlines()[0].split() == [
        "task",
        "pretrain",
        "=>",
        "finetune",
    ]


def test_a_pattern_against_ratios_is_a_difference_of_what_was_said() -> None:
    recipe = hybrid_8b()
    recipe.model.layer_pattern = "M-" * 28
    places = [old.place for old, _ in show.diff(hybrid_8b(), recipe)]
    assert places == ["model.layer_pattern", "model.num_layers", "model.attention_ratio", "model.mlp_ratio"]


def test_python_leaves_defaults_out_and_takes_any_name(tmp_path: Path) -> None:
    recipe = partial(
        pretrain, name='2 "quoted"\nlines', model=config(ModelConfig, layer_pattern="M*"), folder="else where"
    )
    source = python.to_python(recipe)
    assert "hidden_size" not in source
    (tmp_path / "r.py").write_text(source)
    assert resolve(f"{tmp_path}/r.py:{python.function_name(recipe.name)}") == recipe


def test_problems_are_shown_below_the_settings() -> None:
    assert show.tree(hybrid_8b()).splitlines()[-1].startswith("  data.path: is not set")
    assert show.facts(hybrid_8b())["problems"][0]["place"] == "data.path"
    assert show.facts(tiny())["problems"] == []


def test_the_models_of_the_catalogue_have_their_sizes() -> None:
    models = {model["name"]: model for model in show.models()}
    assert models["hybrid_8b"]["layers"] == {"M": 24, "*": 4, "-": 28}
    assert models["transformer_8b"]["mamba_version"] is None
