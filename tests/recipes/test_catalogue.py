"""Every recipe there is, as pretraining and as fine-tuning: built, checked, shown, planned, and written every way."""

import re

import pytest

from hybrid import checks
from hybrid.costs import parameters
from recipes import (
    apply,
    check,
    files,
    finetune,
    plan_text,
    planning,
    python,
    registry,
    resolve,
    settings,
    show,
    shrink,
)
from recipes.settle import settle

RECIPES = [*registry.entries(), *(f"finetune({name})" for name in registry.entries())]

# Totals of the released checkpoints and of models that were instantiated.
KNOWN_PARAMETERS = {
    "hybrid_800m": 907_127_680,
    "hybrid_8b": 8_654_517_248,
    "mamba2_8b": 8_236_999_680,
    "mamba_8b": 8_148_783_104,
    "transformer_8b": 8_540_135_424,
    "mamba2_130m": 128_989_632,
    "mamba2_2_7b": 2_702_599_680,
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1_4b": 1_372_178_432,
    "mamba_2_8b": 2_768_345_600,
    "nemotron_nano_12b_v2": 12_310_001_152,
}


@pytest.mark.parametrize("reference", RECIPES)
def test_a_recipe_is_right_on_the_machine_it_is_meant_for(reference: str) -> None:
    machine = registry.machine(reference)
    assert machine
    recipe = apply(resolve(reference), ["data=mock", "checkpoint=there"])
    assert check(recipe, machine.gpus or 1) == []
    if machine.gpus:
        assert planning.plan(recipe, machine).plan.fits


@pytest.mark.parametrize("reference", RECIPES)
def test_a_recipe_is_shown_and_planned(reference: str) -> None:
    recipe = resolve(reference)
    built = settings(recipe)
    tree = show.tree(recipe)
    assert tree.startswith(f"{built.name} ({'finetune' if 'finetune' in reference else 'pretrain'})")
    assert f"  hidden_size             {built.model.hidden_size}" in tree
    text = plan_text.plan_text(planning.plan(recipe, registry.machine(reference)))
    assert f"{parameters.whole(built).total:,}" in text
    assert ("data.path" in text) == (built.data.source in ("indexed", "sft"))


@pytest.mark.parametrize("reference", RECIPES)
def test_a_recipe_comes_back_equal_from_yaml_and_python(reference: str, tmp_path) -> None:
    recipe = settle(resolve(reference))
    yaml, source = tmp_path / "r.yaml", tmp_path / "r.py"
    yaml.write_text(files.to_yaml(recipe))
    source.write_text(python.to_python(recipe))
    assert resolve(f"@{yaml}") == recipe
    assert resolve(f"{source}:{python.function_name(recipe.name)}") == recipe


@pytest.mark.parametrize("name", registry.entries())
def test_what_the_summary_says_of_the_size_is_true(name: str) -> None:
    total = parameters.whole(settings(resolve(name))).total
    assert KNOWN_PARAMETERS.get(name, total) == total
    said = re.search(r"of ([\d.]+)B parameters", registry.entries()[name].summary)
    if said:
        digits = len(said[1].partition(".")[2])
        assert f"{total / 1e9:.{digits}f}" == said[1]
    layers = re.search(r"\((\d+) layers", registry.entries()[name].summary)
    if layers:
        assert settings(resolve(name)).model.pattern.num_layers == int(layers[1])


def test_released_patterns_have_the_layers_of_their_papers() -> None:
    counts = {
        name: tuple(settings(resolve(name)).model.pattern.counts()[symbol] for symbol in "M*-")
        for name in ("nemotron_h_8b", "nemotron_h_56b", "nemotron_h_47b", "nemotron_nano_12b_v2", "nemotron_nano_9b_v2")
    }
    assert counts == {
        "nemotron_h_8b": (24, 4, 24),
        "nemotron_h_56b": (54, 10, 54),
        "nemotron_h_47b": (45, 5, 48),
        "nemotron_nano_12b_v2": (28, 6, 28),
        "nemotron_nano_9b_v2": (27, 4, 25),
    }


@pytest.mark.parametrize("name", registry.entries())
def test_shrinking_keeps_the_shape_and_the_rules(name: str) -> None:
    large, recipe = settings(resolve(name)), shrink(resolve(name))
    small = settings(recipe)
    assert checks.check(small, 1) == []
    assert parameters.whole(small).total < 1_000_000
    assert set(small.model.pattern.layers) == set(large.model.pattern.layers)
    assert small.model.pattern.layers in large.model.pattern.layers
    for field in ("activation", "normalization", "mamba_version", "position_embedding", "tie_embeddings"):
        assert getattr(small.model, field) == getattr(large.model, field)
    is_grouped = large.model.query_groups < large.model.num_attention_heads
    assert (small.model.query_groups < small.model.num_attention_heads) == is_grouped


@pytest.mark.parametrize("name", registry.entries())
@pytest.mark.parametrize("change", [[], ["parallel.pipeline=2"], ["parallel.context=2"]])
def test_shrinking_can_keep_the_layout(name: str, change: list[str]) -> None:
    recipe = apply(resolve(name), change)
    large = settings(recipe)
    small = settings(shrink(recipe, keep_layout=True))
    assert small.parallel == large.parallel
    world = small.parallel.model_size
    problems = [problem.place for problem in checks.check(large, world) if problem.place != "data.path"]
    assert [problem.place for problem in checks.check(small, world)] == problems


@pytest.mark.parametrize("keep_layout", [False, True])
def test_shrinking_knows_every_layer_kind(keep_layout: bool) -> None:
    changes = ["model.layer_pattern=M+-DGE+", "model.activation=swiglu", "model.num_experts=8"]
    recipe = shrink(apply(resolve("hybrid_8b"), changes), keep_layout=keep_layout)
    small = settings(recipe)
    assert checks.check(small, small.parallel.model_size) == []
    assert set(small.model.pattern.layers) == set("M+-DGE") and parameters.whole(small).total < 1_000_000


def test_finetuning_keeps_what_the_user_has_chosen() -> None:
    recipe = apply(resolve("hybrid_8b"), ["parallel.tensor=8", "data.path=pretraining", "data.tokenizer=mine"])
    tuned = finetune(recipe, "weights")
    built = settings(tuned)
    assert (built.data.source, built.data.path) == ("sft", None), "it reads examples, not what was read before"
    assert (built.name, built.checkpoint.load) == ("hybrid_8b_finetune", "weights")
    assert (built.parallel.tensor, built.data.tokenizer) == (8, "mine")
    assert settings(recipe).optimizer.lr == 2.5e-4, "the given recipe stays as it is"
    tuned.optimizer.lr = 1e-5
    assert settings(finetune(tuned, "others")).optimizer.lr == 1e-5
    assert settings(finetune(tuned)).checkpoint.load == "weights"


def test_finetuning_without_a_checkpoint_is_a_problem() -> None:
    assert [problem.place for problem in check(finetune(resolve("tiny")))] == ["data.path", "checkpoint.load"]


def test_variants_are_written_around_a_name() -> None:
    assert resolve("shrink(hybrid_8b, steps=3)").trainer.max_steps == 3
    assert resolve("finetune(shrink(hybrid_8b), checkpoint=x)").checkpoint.load == "x"
    assert apply(resolve("tiny"), ["model=shrink(nemotron_h_56b)"]).model.hidden_size == 64
