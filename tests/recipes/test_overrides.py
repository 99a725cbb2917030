"""Overrides: NeMo-Run's grammar, typed by annotations, all problems at once."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hybrid.config import ModelConfig, OptimizerConfig, TrainerConfig
from hybrid.errors import ConfigError
from hybrid.run import pretrain
from recipes import apply, config, hybrid_8b, nodes, partial, parts, settings


def small():
    return partial(
        pretrain,
        name="small",
        model=config(ModelConfig, layer_pattern="M-M*-M-M-", hidden_size=256, num_attention_heads=4),
        data=parts.stdlib(sequence_length=512),
        optimizer=config(OptimizerConfig, lr=2e-3),
        trainer=config(TrainerConfig, max_steps=300),
    )


def problems(*arguments: str, recipe=small) -> list[str]:
    with pytest.raises(ConfigError) as error:
        apply(recipe(), list(arguments))
    return [f"{problem.place}: {problem.message}" for problem in error.value.problems]


def test_overrides_set_values_by_the_type_of_their_field() -> None:
    recipe = apply(
        small(),
        [
            "model.hidden_size=2_048",
            "model.ffn_hidden_size=None",
            "model.layer_pattern=M-M*-|MM",
            "model.mamba_version=1",
            "optimizer.lr=1e-4",
            "parallel.sequence=true",
            "data.split=[0.5, 0.25, 0.25]",
            "name='my run'",
        ],
    )
    assert recipe.model.hidden_size == 2048
    assert recipe.model.ffn_hidden_size is None
    assert recipe.model.layer_pattern == "M-M*-|MM"
    assert recipe.model.mamba_version == 1
    assert recipe.optimizer.lr == 1e-4
    assert recipe.parallel.sequence is True
    assert recipe.data.split == [0.5, 0.25, 0.25]
    assert recipe.name == "my run"


def test_the_recipe_itself_is_not_changed() -> None:
    recipe = small()
    apply(recipe, ["model.hidden_size=64", "data.split[0]=98"])
    assert recipe == small()


@pytest.mark.parametrize(
    ("argument", "section", "field", "value"),
    [
        ("trainer.max_steps*=2", "trainer", "max_steps", 600),
        ("trainer.max_steps*=0.5", "trainer", "max_steps", 150),
        ("trainer.max_steps/=3", "trainer", "max_steps", 100),
        ("trainer.max_steps+=1", "trainer", "max_steps", 301),
        ("trainer.max_steps-=1", "trainer", "max_steps", 299),
        ("optimizer.lr /= 2", "optimizer", "lr", 1e-3),
        ("model.layer_pattern+=M-", "model", "layer_pattern", "M-M*-M-M-M-"),
        ("data.split+=[1]", "data", "split", [99.0, 1.0, 0.0, 1.0]),
        ("data.split-=[1]", "data", "split", [99.0, 0.0]),
        ("data.split[1]=2", "data", "split", [99.0, 2.0, 0.0]),
        ("data.split[0]-=1", "data", "split", [98.0, 1.0, 0.0]),
        ("checkpoint=/models/8b", "checkpoint", "load", "/models/8b"),
    ],
)
def test_operators_change_what_is_there(argument: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(apply(small(), [argument]), section), field) == value


def test_a_section_takes_a_part_and_keeps_what_the_part_leaves_open() -> None:
    recipe = apply(small(), ["data=mock"])
    assert (recipe.data.source, recipe.data.sequence_length) == ("mock", 512)
    recipe = apply(small(), ["data=mock(sequence_length=64)", "parallel='tensor_parallel(2)'".replace("'", "")])
    assert (recipe.data.sequence_length, recipe.parallel.tensor, recipe.parallel.sequence) == (64, 2, True)


def test_a_section_takes_that_of_another_recipe_and_overrides_go_on_from_it() -> None:
    recipe = apply(small(), ["model=hybrid_8b", "model.num_layers=28"])
    assert recipe.model.hidden_size == 4096
    assert settings(recipe).model.pattern.num_layers == 28


def test_a_section_takes_a_users_function_or_file(tmp_path: Path) -> None:
    python = tmp_path / "mine.py"
    python.write_text(
        "from hybrid.config import OptimizerConfig\n"
        "from recipes import config\n"
        "def adam(lr: float = 1.0):\n"
        "    return config(OptimizerConfig, lr=lr)\n"
    )
    yaml = tmp_path / "model.yaml"
    yaml.write_text("layer_pattern: M*\nhidden_size: 64\n")
    recipe = apply(small(), [f"optimizer={python}:adam(lr=0.5)", f"model=@{yaml}"])
    assert recipe.optimizer.lr == 0.5
    assert (recipe.model.layer_pattern, recipe.model.hidden_size) == ("M*", 64)


def test_a_config_of_any_dataclass_takes_overrides() -> None:
    @dataclass
    class Place:
        nodes: int = 1
        env: dict[str, str] = field(default_factory=lambda: {"A": "1"})

    place = apply(config(Place), ["nodes*=3", "env.B='2'", "env|={C: 3}"])
    assert (place.nodes, place.env) == (3, {"A": "1", "B": "2", "C": "3"})
    assert problems("max_step=3", recipe=lambda: config(TrainerConfig)) == [
        "max_step: TrainerConfig has no field max_step; did you mean max_steps?"
    ]


def test_all_problems_are_reported_at_once_with_place_and_nearest_name() -> None:
    words = ["model.hiden_size=3", "model.activation=gleu", "foo=1", "trainer.seed=x", "hidden_size=5", "trainer.lr=1"]
    assert problems(*words) == [
        "model.hiden_size: model has no field hiden_size; did you mean hidden_size?",
        "model.activation: 'gleu' is not one of gelu, squared_relu, swiglu; did you mean gelu?",
        "foo: a recipe has no field foo",
        "trainer.seed: 'x' is not a whole number",
        "hidden_size: a recipe has no field hidden_size; did you mean model.hidden_size?",
        "trainer.lr: trainer has no field lr; did you mean optimizer.lr?",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", ": an argument is empty; write for example model.hidden_size=2048"),
        ("train", ": 'train' is not key=value; write for example model.hidden_size=2048"),
        ("=3", "=3: '' is not a field; write its section and name, such as model.hidden_size"),
        ("model..x=3", "model..x=3: 'model..x' is not a field; write its section and name, such as model.hidden_size"),
        ("name=", "name: has nothing after '='; write a value, None for no value, '' in quotes for no text"),
        ("trainer.seed%=3", "trainer.seed: '%=' is no operator of overrides; they are = += -= *= /= |="),
        ("trainer.seed/=0", "trainer.seed: cannot be divided by 0"),
        ("trainer.seed/=5", "trainer.seed: 1234 / 5 makes 246.8 is not a whole number"),
        (
            "trainer.max_samples*=2",
            "trainer.max_samples: is None, so there is nothing for '*=' to change; set it with '='",
        ),
        ("model.tie_embeddings+=1", "model.tie_embeddings: is False, which '+=' cannot change; set it with '='"),
        ("model.layer_pattern*=2", "model.layer_pattern: is text, which '*=' cannot change; set it with '='"),
        ("data.split-=[5]", "data.split: does not hold 5.0, so '-=' cannot take it out"),
        ("data.split[9]=1", "data.split[9]: split has 3 items, counted from 0"),
        (
            "model.activation.x=1",
            "model.activation.x: activation takes one of gelu, squared_relu, swiglu and has no fields of its own",
        ),
        ("data+=mock", "data: is a section: '+=' works on its fields, not on it"),
        (
            "data=None",
            "data: is a section, and 'None' is neither a part nor a recipe; single fields are set with data.source=...",
        ),
        (
            "data=mok",
            "data: is a section, and 'mok' is neither a part nor a recipe; did you mean mock?; "
            "single fields are set with data.source=...",
        ),
        ("data=mock(length=3)", "mock: takes no argument 'length'; its arguments: sequence_length"),
        ("data=mock(sequence_length=a)", "mock: sequence_length: 'a' is not a whole number"),
        ("data[0]=1", "data[0]: a section has names, not numbers"),
    ],
)
def test_what_cannot_be_applied_says_so_in_one_sentence(argument: str, message: str) -> None:
    assert problems(argument) == [message]


def test_of_very_many_names_those_near_to_it_are_listed() -> None:
    with pytest.raises(ConfigError) as error:
        apply(small(), ["model.hiden_size=3", "trainer.x=1"])
    near, every = [problem.detail for problem in error.value.problems]
    assert near.startswith("near to it: hidden_size, ffn_hidden_size,")
    assert near.endswith(f"; `hybrid show tiny` shows all {len(nodes.schema(ModelConfig))}")
    assert every.startswith("valid names: max_steps, ")


def test_an_override_that_another_would_undo_is_refused() -> None:
    assert problems("trainer.seed=1", "trainer.seed=2") == [
        "trainer.seed: is given twice: 'trainer.seed=1' and 'trainer.seed=2'; leave one out"
    ]
    assert problems("model.hidden_size=64", "model=hybrid_8b") == [
        "model: 'model=hybrid_8b' would undo 'model.hidden_size=64'; write it before that"
    ]
    assert apply(hybrid_8b(), ["trainer.seed=1", "trainer.seed*=2"]).trainer.seed == 2


def set_on_the_command_line(recipe) -> list[str]:
    """The overrides that have left a mark anywhere in a recipe."""
    sections = [recipe, *(getattr(recipe, name) for name in nodes.SECTIONS)]
    histories = [entries for section in sections for entries in section.__argument_history__.values()]
    return [
        entry.location.function_name
        for entries in histories
        for entry in entries
        if entry.location.filename == nodes.COMMAND_LINE
    ]


FIELDS = [f"{section}.{name}" for section, cls in nodes.SECTIONS.items() for name in nodes.schema(cls)]
VALUES = (
    st.text(max_size=12)
    | st.sampled_from(
        ["None", "true", "1e-4", "1_000", "[1, 2", "{a: 1}", "M-M*-|", "@x.yaml", "a.py:f", "tiny(", "''"]
    )
    | st.integers().map(str)
    | st.floats().map(str)
)


@examples(max_examples=300, deadline=None)
@given(
    st.sampled_from([*FIELDS, "name", "folder", *nodes.SECTIONS, "data.split[1]"]),
    st.sampled_from(["=", "+=", "-=", "*=", "/=", "|="]),
    VALUES,
)
@example("checkpoint", "=", "'")
@example("data", "=", "mock()()")
def test_an_override_is_applied_or_refused_but_never_lost(key: str, operator: str, value: str) -> None:
    argument = f"{key}{operator}{value}"
    try:
        recipe = apply(hybrid_8b(), [argument])
    except ConfigError as error:
        assert all(problem.place or problem.message for problem in error.problems)
    else:
        assert set_on_the_command_line(recipe) == [argument.strip()]


@examples(max_examples=300, deadline=None)
@given(st.text(max_size=30))
@example("model.layer_pattern=M-\n*")
@example("data='")
def test_any_text_is_an_override_or_a_problem(argument: str) -> None:
    try:
        recipe = apply(small(), [argument])
    except ConfigError as error:
        assert str(error)
    else:
        assert set_on_the_command_line(recipe) == [argument.strip()]
