"""Everything that may stand where a recipe is expected, and what is said of everything else."""

import sys
from pathlib import Path

import pytest

import recipes
from hybrid.errors import ConfigError
from recipes import files, registry, resolve

USERS_FILE = '''
from __future__ import annotations

from recipes import tiny
import neighbour

def mine(steps: int = 7, name: "str | None" = None):
    """My own."""
    recipe = tiny()
    recipe.trainer.max_steps = steps
    recipe.name = name or neighbour.NAME
    return recipe

def forgetful():
    tiny()

def broken():
    return tiny().model.no_such_field

def half():
    return tiny().model
'''


@pytest.fixture
def users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    (tmp_path / "neighbour.py").write_text("NAME = 'from beside'\n")
    (tmp_path / "my_recipes.py").write_text(USERS_FILE)
    return str(tmp_path / "my_recipes.py")


def problem(reference: str) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(reference)
    return str(error.value).partition("\n")[0]


def test_every_recipe_has_a_summary_and_its_own_name() -> None:
    for name, entry in registry.entries().items():
        assert entry.summary.endswith("."), name
        assert resolve(name).name == name


def test_recipes_are_importable_by_name_and_listed_for_type_checkers() -> None:
    source = Path(recipes.__file__).read_text()
    for name in registry.entries():
        assert getattr(recipes, name) is registry.entries()[name].function
        assert f"import {name} as {name}\n" in source
    with pytest.raises(ImportError):
        from recipes import no_such_recipe  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_no_module_hides_a_public_name() -> None:
    modules = {path.stem for path in Path(recipes.__file__).parent.glob("*.py")}
    assert not modules & {*registry.entries(), *recipes._HOME}


def test_a_users_function_works_where_a_name_does(users_file: str) -> None:
    assert resolve(f"{users_file}:mine").name == "from beside"
    called = resolve(f"{users_file}:mine(9, name='x, y')")
    assert (called.trainer.max_steps, called.name) == (9, "x, y")


def test_a_file_and_a_runs_folder_work_where_a_name_does(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(files.to_yaml(recipes.tiny()))
    assert resolve(f"@{run}/recipe.yaml") == resolve(str(run)) == resolve(f"{run}/recipe.yaml") == recipes.tiny()


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert problem("hybrid8b") == "hybrid8b: there is no recipe of this name; did you mean hybrid_8b?"
    assert problem("") == "the name of the recipe is empty; `hybrid list` shows the names"
    assert problem("tiny(3)") == "tiny: takes fewer arguments; it takes none"


def test_an_unknown_file_or_function_is_named(users_file: str) -> None:
    assert problem(f"{users_file}:mien") == f"{users_file}:mien: {users_file} has no function mien; did you mean mine?"
    assert problem(users_file) == f"{users_file}: say which function, as in {users_file}:mine"
    near = users_file.replace("my_recipes", "my_recipe")
    assert problem(f"{near}:mine") == f"{near}: there is no such file; did you mean my_recipes.py?"
    assert problem("no/such/run").startswith("no/such/run: there is no such recipe, and no folder of a run there")


def test_what_a_users_function_does_wrong_is_said_with_its_line(users_file: str) -> None:
    assert problem(f"{users_file}:forgetful").endswith(
        "is no recipe: it returned nothing; did you forget to return the recipe?"
    )
    assert problem(f"{users_file}:half").endswith("is no recipe: it returned a config of ModelConfig")
    assert problem(f"{users_file}:broken").startswith(f"{users_file}:18: ModelConfig has no no_such_field")
    assert problem(f"{users_file}:mine(stepps=3)").endswith(
        "takes no argument 'stepps'; did you mean steps?; its arguments: steps, name"
    )
    assert problem(f"{users_file}:mine(steps=3, steps=4)").endswith("the argument steps is there twice")
    assert problem(f"{users_file}:mine(steps=x)").endswith("steps: 'x' is not a whole number")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\nraise ValueError('bad day')\n", ":2: raised ValueError: bad day"),
        ("def f(:\n", ":1: raised SyntaxError: invalid syntax"),
        ("import no_such_module_here\n", ":1: raised ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("import sys\n\nsys.exit(3)\n", ":3: raised SystemExit: 3"),
    ],
)
def test_what_a_users_file_raises_is_said_with_its_line(tmp_path: Path, source: str, says: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    assert problem(f"{file}:f") == f"{file}{says}"


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("config(ModelConfig, hiden_size=3)", "ModelConfig has no field hiden_size; did you mean hidden_size?"),
        ("partial(pretrain, name='x', dta=3)", "a recipe has no field dta; did you mean data?"),
        ("setattr(tiny().model, 'hiden_size', 3)", "ModelConfig has no hiden_size; did you mean hidden_size?"),
        ("tiny().model.hiden_size", "ModelConfig has no hiden_size; did you mean hidden_size?"),
        ("tiny().modl.hidden_size", "a recipe has no modl; did you mean model?"),
        ("parts.mok(128)", "recipes.parts has no mok; did you mean mock?"),
        ("exec('from recipes import lauch')", "recipes has no lauch; did you mean launch?"),
    ],
)
def test_a_misspelt_name_in_a_users_recipe_gets_the_nearest_one(tmp_path: Path, statement: str, says: str) -> None:
    file = tmp_path / "own.py"
    imports = "from recipes import config, partial, parts, tiny\nfrom hybrid.run import pretrain, ModelConfig\n"
    file.write_text(f"{imports}def f():\n    {statement}\n")
    assert problem(f"{file}:f").removeprefix(f"{file}:4: ").removeprefix("raised TypeError: ") == says
