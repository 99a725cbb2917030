"""The command: exit codes, one sentence per mistake on stderr, facts on stdout."""

import json
from pathlib import Path

import pytest

from cli import main
from hybrid.errors import UserError
from recipes import resolve, tiny


@pytest.fixture
def hybrid(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main.run(list(arguments))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err or "--debug" in arguments
        return int(end.value.code or 0), out, err

    return run


def test_list_has_a_line_for_each_recipe(hybrid) -> None:
    code, out, err = hybrid("list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("tiny  ")
    assert json.loads(hybrid("list", "--json")[1])[0]["name"] == "tiny"


def test_show_says_value_meaning_and_what_none_stands_for(hybrid) -> None:
    code, out, err = hybrid("show", "hybrid_8b", "model.ffn_hidden_size=None")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert (
        "  ffn_hidden_size         None -> 16384           inner width of an MLP layer; None: 4 x hidden_size\n" in out
    )
    assert "  sequence_length         4096                    tokens of a sample\n" in out
    facts = json.loads(hybrid("show", "hybrid_8b", "--json")[1])
    assert facts["config"]["model"]["hidden_size"] == 4096
    assert facts["derived"]["model.attention_head_dim"] == 128


def test_what_show_prints_as_yaml_reads_back(hybrid, tmp_path: Path) -> None:
    _, out, _ = hybrid("show", "tiny", "trainer.seed=3", "--format", "yaml")
    (tmp_path / "a.yaml").write_text(out)
    recipe = tiny()
    recipe.trainer.seed = 3
    assert resolve(f"@{tmp_path}/a.yaml") == recipe
    assert hybrid("show", f"@{tmp_path}/a.yaml", "--format", "yaml")[1] == out


def test_what_show_prints_as_python_runs(hybrid, tmp_path: Path) -> None:
    _, out, _ = hybrid("show", "tiny", "trainer.seed=3", "--format", "python")
    (tmp_path / "a.py").write_text(out)
    assert resolve(f"{tmp_path}/a.py:tiny").trainer.seed == 3


def test_diff_says_what_differs_between_names_and_files(hybrid, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(hybrid("show", "tiny", "--format", "yaml")[1])
    assert hybrid("diff", "tiny", f"@{tmp_path}/a.yaml") == (0, "no difference\n", "")
    assert json.loads(hybrid("diff", "hybrid_800m", "hybrid_8b", "--json")[1])["model.num_layers"] == [48, 56]


def test_plan_prints_text_json_layouts_and_a_picture(hybrid, tmp_path: Path) -> None:
    code, out, err = hybrid("plan", "hybrid_8b", "--picture", str(tmp_path / "p.svg"))
    assert (code, err) == (0, "")
    assert out.startswith("hybrid_8b on 8 x h100: tensor 4, data 2")
    assert (tmp_path / "p.svg").exists()
    assert json.loads(hybrid("plan", "hybrid_8b", "--gpus", "4", "--json")[1])["world_size"] == 4
    assert hybrid("plan", "hybrid_8b", "--search")[1].startswith(" 1. ")
    assert json.loads(hybrid("plan", "hybrid_8b", "--search", "--json")[1])["candidates"]


def test_list_executors_has_the_kinds_and_ones_own(hybrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "executors.yaml"
    path.write_text("big:\n  kind: slurm\n  nodes: 16\n")
    monkeypatch.setenv("HYBRID_EXECUTORS", str(path))
    code, out, _ = hybrid("list", "executors")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["local", "slurm", "docker", "big"]
    assert "slurm, nodes=16" in out


def test_list_models_has_their_sizes(hybrid) -> None:
    assert "8,654,517,248" in hybrid("list", "models")[1]
    assert json.loads(hybrid("list", "models", "--json")[1])[1]["hidden_size"] == 1024


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["shw"], "No such command 'shw'. Did you mean 'show'?"),
        (["show"], "Missing argument 'RECIPE'."),
        (["show", "tiny", "--fromat", "yaml"], "No such option: --fromat; did you mean --format?"),
        (["pretrain", "tiny", "--nam=m1"], "No such option: --nam; a field is set without dashes: name=..."),
        (["pretrain", "tiny", "--name", "m1"], "No such option: --name; a field is set without dashes: name=..."),
        (["pretrain", "tiny", "--lr=1"], "No such option: --lr; a field is set without dashes: optimizer.lr=..."),
        (["plan", "tiny", "--sweep"], "No such option: --sweep; pretrain, finetune have it"),
        (["runs", "--nam"], "No such option: --nam\n"),
        (["show", "tny"], "tny: there is no recipe of this name; did you mean tiny?"),
        (["show", "tiny", "model.layer_pattern=M-X"], "model.layer_pattern: 'X' is no layer symbol"),
        (["plan", "hybrid_8b", "--gpus", "3"], "parallel: wants processes in multiples of"),
        (["plan", "hybrid_8b", "--gpu", "h1"], "gpu: 'h1' is unknown"),
        (["diff", "tiny", "tny"], "tny: there is no recipe of this name; did you mean tiny?"),
        (["pretrain", "tiny", "seed=1"], "seed: a recipe has no field seed; did you mean trainer.seed?"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(hybrid, arguments: list[str], says: str) -> None:
    code, out, err = hybrid(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(says)


def test_other_failures_end_with_1_and_a_traceback_only_on_request(hybrid, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception):
        def resolve(reference: str):
            raise error

        return resolve

    monkeypatch.setattr("recipes.registry.resolve", fail(UserError("the disk is full")))
    assert hybrid("show", "tiny") == (1, "", "the disk is full\n")
    monkeypatch.setattr("recipes.registry.resolve", fail(ZeroDivisionError("oops")))
    code, out, err = hybrid("show", "tiny")
    assert (code, out) == (1, "")
    assert err.startswith("hybrid failed: ZeroDivisionError: oops\n")
    assert "Traceback" in hybrid("show", "tiny", "--debug")[2]
    assert "Traceback" in hybrid("--debug", "show", "tiny")[2]
    monkeypatch.setattr("recipes.registry.resolve", fail(KeyboardInterrupt()))  # pyright: ignore[reportArgumentType]
    assert hybrid("show", "tiny") == (130, "", "")
