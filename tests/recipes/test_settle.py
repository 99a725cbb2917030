"""An explicit layer pattern against number of layers and ratios: what is superseded, what contradicts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.errors import ConfigError
from hybrid.run import pretrain
from recipes import apply, check, config, files, hybrid_8b, partial, resolve, settings
from recipes.launching import launch
from recipes.settle import fitted, settle


def small():
    return partial(
        pretrain,
        name="small",
        model=config(ModelConfig, layer_pattern="M-M*-M-M-", hidden_size=256, num_attention_heads=4),
        trainer=config(TrainerConfig, max_steps=300, global_batch_size=8),
    )


def places(make: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        make()
    return [problem.place for problem in error.value.problems]


def test_a_pattern_set_on_a_recipe_supersedes_its_ratios() -> None:
    recipe = hybrid_8b()
    recipe.model.layer_pattern = "M-M*-M-|M-M*-M-"
    built = settings(recipe)
    assert built.model.pattern.text == "M-M*-M-|M-M*-M-"
    assert (built.model.num_layers, built.model.attention_ratio, built.model.mlp_ratio) == (None, None, None)
    assert recipe.model.num_layers == 56, "the recipe itself stays as it was"


def test_a_pattern_on_the_command_line_supersedes_the_recipes_ratios() -> None:
    assert settings(apply(hybrid_8b(), ["model.layer_pattern=M-M*"])).model.num_layers is None


def test_ratios_set_after_a_pattern_must_agree_with_it() -> None:
    recipe = small()
    recipe.model.num_layers = 9
    recipe.model.mlp_ratio = 0.44  # 4 of 9, as in the pattern
    assert settings(recipe).model.pattern.text == "M-M*-M-M-"
    recipe.model.attention_ratio = 0.5
    assert places(lambda: settings(recipe)) == ["model.attention_ratio"]
    recipe.model.layer_pattern = None
    assert settings(recipe).model.pattern.num_layers == 9


def test_a_contradicting_override_says_how_to_drop_the_pattern() -> None:
    with pytest.raises(ConfigError, match=r"set model\.layer_pattern=None"):
        settings(apply(small(), ["model.attention_ratio=0.5"]))
    with pytest.raises(ConfigError, match=r"set model\.layer_pattern=None"):
        settings(apply(small(), ["model.num_layers=12"]))
    changed = ["model.num_layers=12", "model.layer_pattern=None", "model.attention_ratio=0.25"]
    assert settings(apply(small(), changed)).model.pattern.counts()["*"] == 3


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_overrides_does_not_matter(order: int) -> None:
    both = ["model.layer_pattern=M-M*", "model.num_layers=5"][::order]
    assert places(lambda: settings(apply(hybrid_8b(), both))) == ["model.num_layers"]
    both = ["model.layer_pattern=M-M*", "model.mlp_ratio=0.75"][::order]
    assert places(lambda: settings(apply(hybrid_8b(), both))) == ["model.mlp_ratio"]


def test_pattern_and_ratios_in_one_statement_must_agree() -> None:
    recipe = small()
    recipe.model = config(ModelConfig, num_layers=5, layer_pattern="M-M*")
    assert places(lambda: settings(recipe)) == ["model.num_layers"]
    recipe.model = config(ModelConfig, layer_pattern="M-M*", num_layers=5)
    assert places(lambda: settings(recipe)) == ["model.num_layers"]


def test_pattern_and_ratios_in_one_file_must_agree(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nmodel:\n  num_layers: 5\n  layer_pattern: M-M*\n")
    assert places(lambda: settings(resolve(f"@{file}"))) == ["model.num_layers"]


def test_the_newer_of_steps_and_samples_counts() -> None:
    built = settings(apply(hybrid_8b(), ["trainer.max_steps=10"]))
    assert (built.trainer.steps, built.trainer.samples) == (10, 80)
    built = settings(apply(small(), ["trainer.max_samples=80"]))
    assert (built.trainer.steps, built.trainer.samples) == (10, 80)
    recipe = small()
    recipe.trainer = config(TrainerConfig, max_steps=10, max_samples=81)
    assert places(lambda: settings(recipe)) == ["trainer.max_samples"]


@pytest.mark.parametrize(
    ("recipe", "words", "warmup"),
    [
        ("tiny", ["trainer.max_steps=3"], 2),  # of 24 samples
        ("tiny", ["trainer.max_steps=21"], 160),  # of 168
        ("finetune(tiny)", ["trainer.max_samples=1280"], 128),  # 50 steps of 128 otherwise
        ("nemotron_h_8b", ["trainer.max_steps=10"], 768),
        ("mine.py:shorter()", [], 2),
    ],
)
def test_a_run_made_shorter_than_its_warm_up_has_a_shorter_one(
    recipe: str, words: list[str], warmup: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "from recipes import tiny",
        "def shorter():",
        "    it = tiny()",
        "    it.trainer.max_steps = 3",
        "    return it",
    ]
    Path("mine.py").write_text("\n".join(lines))
    made = apply(resolve(recipe), words)
    assert settings(made).warmup_samples == warmup
    assert ("of the run's" in fitted(settle(made))) == (words != ["trainer.max_steps=21"])
    Path("settled.yaml").write_text(files.to_yaml(made))
    assert settings(resolve("@settled.yaml")).warmup_samples == warmup


def test_a_final_decay_longer_than_a_shortened_run_is_a_tenth_again() -> None:
    made = settings(apply(resolve("nemotron_nano_12b_v2"), ["trainer.max_steps=10"]))
    assert made.optimizer.wsd_decay_samples is None
    assert made.warmup_samples == made.trainer.samples // 10


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.warmup_steps=500"],
        ["trainer.max_steps=3", "optimizer.warmup_steps=5"],
        ["optimizer.warmup_steps=5", "trainer.max_steps=3"],
        ["trainer=@short.yaml", "optimizer.warmup_steps=5"],
    ],
)
def test_a_warm_up_that_was_said_is_never_shortened(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text("max_steps: 3\n")
    made = apply(resolve("tiny"), words)
    assert "optimizer.warmup_steps" in [problem.place for problem in check(made)]


def test_a_function_that_contradicts_itself_is_refused() -> None:
    recipe = partial(
        pretrain,
        name="both",
        model=config(ModelConfig, layer_pattern="M-M*"),
        optimizer=config(OptimizerConfig, warmup_samples=160),
        trainer=config(TrainerConfig, max_steps=3),
    )
    assert settings(recipe).warmup_samples == 160
    assert "optimizer.warmup_samples" in [problem.place for problem in check(recipe)]


def test_every_value_of_a_wrong_type_is_named() -> None:
    recipe = small()
    recipe.model.hidden_size = "big"
    recipe.model.activation = "gleu"
    recipe.data = None
    recipe.name = None
    assert places(lambda: settle(recipe)) == ["data", "name", "model.hidden_size", "model.activation"]


def test_a_section_that_a_recipe_leaves_out_has_its_defaults() -> None:
    recipe = small()
    del recipe.checkpoint
    assert settings(recipe).checkpoint.keep_last == 3


def test_what_is_launched_is_settled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched = []
    monkeypatch.setattr("recipes.processes.launch", lambda recipe, *rest, **named: launched.append(recipe) or 0)
    recipe = apply(hybrid_8b(), ["model.layer_pattern=M-M*", "data=mock", f"folder={tmp_path}"])
    assert launch(recipe, dry_run=True) == 0
    assert launched[0].model.num_layers is None, "the function that trains would call it a contradiction"
