"""Plans of recipes: on which machine, with which problems, as text and as a picture."""

import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hybrid.errors import ConfigError
from recipes import apply, finetune, hybrid_8b, picture, plan_text, planning, registry, resolve, tiny


def test_the_machine_is_the_recipes_own_or_the_fewest_gpus_that_do() -> None:
    machine = registry.machine("hybrid_8b")
    assert planning.plan(hybrid_8b(), machine).plan.world_size == 8
    assert planning.plan(hybrid_8b(), machine, gpus=4).plan.world_size == 4
    assert planning.plan(apply(hybrid_8b(), ["parallel.pipeline=3"]), machine).plan.world_size == 12
    assert planning.plan(hybrid_8b()).plan.world_size == 4
    assert registry.machine("finetune(hybrid_8b, checkpoint=x)") == machine
    assert registry.machine("shrink(hybrid_8b)") is None


def test_a_users_recipe_may_name_its_machine(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from recipes import tiny\nfrom recipes.registry import recipe\n\n"
        '@recipe(gpu="h200", gpus=4)\ndef big():\n    return tiny()\n\ndef small():\n    return tiny()\n'
    )
    machine = registry.machine(f"{tmp_path}/mine.py:big")
    assert machine
    assert (machine.gpu, machine.gpus) == ("h200", 4)
    assert registry.machine(f"{tmp_path}/mine.py:small") is None


def test_files_that_are_not_named_yet_do_not_keep_from_planning() -> None:
    planned = planning.plan(finetune(hybrid_8b()))
    assert [problem.place for problem in planned.problems] == ["data.path", "checkpoint.load"]
    assert "to be settled before it can run\n  data.path" in plan_text.plan_text(planned)
    assert planned.as_dict()["problems"][0]["place"] == "data.path"


def test_all_else_does() -> None:
    with pytest.raises(ConfigError) as error:
        planning.plan(apply(hybrid_8b(), ["parallel.tensor=3", "optimizer.lr=-1"]))
    assert [problem.place for problem in error.value.problems] == ["optimizer.lr"], "ranges come before relations"
    with pytest.raises(ConfigError, match="but there are 6"):
        planning.plan(hybrid_8b(), gpus=6)


def test_the_text_says_what_a_person_pays_for() -> None:
    recipe = apply(resolve("nemotron_h_56b"), ["parallel.pipeline=4", "trainer.global_batch_size=512"])
    text = plan_text.plan_text(planning.plan(recipe, gpus=128))
    for piece in (
        "nemotron_h_56b on 128 x h100: tensor 8, pipeline 4, data 4; 128 micro batches a step",
        "54 Mamba (46%), 10 attention (8%), 54 MLP (46%)",
        "56,324,350,464, of these 54,176,866,816 non-embedding",
        "GFLOP per token",
        "per GPU on the fullest pipeline stage: fits",
        "4 stages, which wait for each other",
        "stage 3: ",
        "GPU-hours",
        "█",
    ):
        assert piece in text
    assert "at the stated MFU of 40%" in plan_text.plan_text(planning.plan(recipe, gpus=128, mfu=0.4))


def test_a_recipe_for_a_machine_without_gpu_says_so() -> None:
    assert "meant for a machine without GPU" in plan_text.plan_text(planning.plan(tiny(), registry.machine("tiny")))


def test_layouts_are_listed_with_reason_and_overrides() -> None:
    found = planning.layouts(hybrid_8b(), gpus=8)
    text = plan_text.search_text(found)
    changes = [line.strip() for line in text.splitlines() if "=" in line and line.startswith("    ")]
    stated = [" ".join(f"{name}={value}" for name, value in each.overrides.items()) for each in found.candidates]
    assert [" ".join(shlex.split(line)) for line in changes] == [line for line in stated if line], "fit for a shell"
    assert text.startswith(" 1. ")
    assert "parallel." in text
    best = found.candidates[0]
    changed = apply(hybrid_8b(), [f"{name}={value}" for name, value in best.overrides.items()])
    assert planning.plan(changed, gpus=8).plan.step.seconds == pytest.approx(best.plan.step.seconds)


def test_no_layout_says_what_the_smallest_would_need() -> None:
    text = plan_text.search_text(planning.layouts(resolve("nemotron_h_56b"), gpus=1))
    assert text.startswith("no layout fits: the smallest needs ")


def test_the_picture_is_an_svg_with_a_box_per_layer(tmp_path: Path) -> None:
    plan = planning.plan(hybrid_8b()).plan
    picture.write(plan, tmp_path / "p.svg")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if box.get("y") == "48"]
    assert len(boxes) == 56
    with pytest.raises(ConfigError, match=r"call it p\.svg"):
        picture.write(plan, tmp_path / "p.png")
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        picture.write(plan, tmp_path / "no" / "p.svg")
