"""Recipes as YAML: an equal recipe comes back, and every mistake has its line."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from recipes import apply, files, registry, resolve, settings, tiny
from recipes.settle import settle


def read(tmp_path: Path, text: str) -> list[str]:
    """The problems of a file."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        files.read_recipe(file)
    return [f"{problem.place}: {problem.message}".replace(f"{file}", "r.yaml") for problem in error.value.problems]


@pytest.mark.parametrize("name", registry.entries())
def test_every_recipe_comes_back_equal(tmp_path: Path, name: str) -> None:
    recipe = settle(resolve(name))
    file = tmp_path / "r.yaml"
    file.write_text(files.to_yaml(recipe))
    assert files.read_recipe(file) == recipe
    assert settings(files.read_recipe(file)) == settings(recipe)


def test_another_reader_of_yaml_sees_the_same_values() -> None:
    plain = yaml.safe_load(files.to_yaml(tiny()))
    assert plain["model"]["norm_epsilon"] == 1e-5
    assert plain["model"]["position_embedding"] == "none"
    assert plain["model"]["num_layers"] is None
    assert plain["data"]["split"] == [99.0, 1.0, 0.0]


@examples(max_examples=50, deadline=None)
@given(st.text(), st.one_of(st.none(), st.text()), st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_any_text_and_any_numbers_come_back(tmp_path_factory, name: str, path: str | None, split: list[float]) -> None:
    recipe = tiny()
    recipe.name, recipe.data.path, recipe.data.split = name, path, split
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        text = files.to_yaml(recipe)
    except ConfigError:
        return
    file.write_text(text, encoding="utf-8", newline="")
    back = files.read_recipe(file)
    assert (back.name, back.data.path, back.data.split) == (name, path, split)


def test_a_file_by_hand_may_be_short_and_write_numbers_as_people_do(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: mine\nmodel:\n  layer_pattern: M-M*\noptimizer:\n  lr: 1e-4\n  eps: 1e-8\ndata:\n  split: [1, 1e-2]\n"
    )
    built = settings(files.read_recipe(file))
    assert (built.optimizer.lr, built.optimizer.eps, built.data.split) == (1e-4, 1e-8, [1.0, 0.01])
    assert built.checkpoint.keep_last == 3


def test_overrides_go_on_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(files.to_yaml(tiny()))
    assert apply(resolve(f"@{file}"), ["trainer.seed=1"]).trainer.seed == 1


def test_all_problems_of_a_file_come_with_their_lines(tmp_path: Path) -> None:
    text = "name: a\ntask: pretran\nmodle:\n  x: 1\nmodel:\n  hiden_size: 3\n  activation: gleu\n  num_layers: many\n"
    assert read(tmp_path, text) == [
        "r.yaml:2: there is no task 'pretran'; did you mean pretrain?",
        "r.yaml:3: a recipe has no field modle; did you mean model?",
    ]
    assert read(tmp_path, text.replace("pretran", "pretrain")) == [
        "r.yaml:3: a recipe has no field modle; did you mean model?",
        "r.yaml:6: model has no field hiden_size; did you mean hidden_size?",
        "r.yaml:7: model.activation: 'gleu' is not one of gelu, squared_relu, swiglu; did you mean gelu?",
        "r.yaml:8: model.num_layers: 'many' is not a whole number",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: is empty"),
        ("- a\n", "r.yaml:1: a recipe is a mapping, one 'name: value' a line"),
        ("name: a\nmodel: 3\n", "r.yaml:2: the section model is a mapping, one 'name: value' a line"),
        ("name: a\nname: b\n", "r.yaml:2: name is there twice"),
        ("name: [a\n", "r.yaml:2: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("folder: x\n", "r.yaml: the recipe has no name; write name: my-run"),
        ("version: 7\nname: a\n", "r.yaml:1: the file is a recipe of version 7, and this program reads version 1"),
        ("name: !!python/object:os.system a\n", "r.yaml:1: name: cannot be read"),
    ],
)
def test_what_is_no_recipe_says_so(tmp_path: Path, text: str, message: str) -> None:
    assert [found[: len(message)] for found in read(tmp_path, text)] == [message]


def test_a_missing_file_gets_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean mine\.yaml\?"):
        resolve(f"@{tmp_path}/mime.yaml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        resolve(f"@{tmp_path}")
