"""Checkpoints as files: whole or not there, found damaged, kept and removed, written while the training goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hybrid.config import CheckpointConfig, Settings
from hybrid.errors import ConfigError, UserError
from hybrid.training import checksums, folder, provenance
from hybrid.training.loop import train
from tests import toy


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run of six steps with checkpoints after two, four and six."""
    run = toy.settings(tmp_path_factory.mktemp("checkpoints"), "whole", steps=6, optimizer={"decay_samples": 100})
    train(run)
    return run


@pytest.fixture
def copied(finished: Settings, tmp_path: Path) -> Settings:
    """The same run in a folder of its own, with two steps more to go."""
    shutil.copytree(finished.folder, tmp_path / "runs")
    return replace(finished, folder=str(tmp_path / "runs"), trainer=replace(finished.trainer, max_steps=8))


def checkpoints(run: Settings) -> Path:
    return Path(run.folder) / run.name / "checkpoints"


def test_a_checkpoint_has_settings_versions_checksums_and_its_tokenizer(finished: Settings) -> None:
    path = checkpoints(finished) / "iter_0000006"
    written = json.loads((path / "versions.json").read_text())
    assert written["format"] == provenance.FORMAT
    assert {"python", "torch", "megatron-core"} <= written.keys()
    assert (path / "tokenizer" / "hybrid_tokenizer.json").is_file()
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert json.loads((path / "checksums.json").read_text())["files"].keys() == names - {"checksums.json"}
    assert checksums.damage(path) == ""


def test_a_run_that_is_made_longer_says_what_becomes_of_its_learning_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = toy.settings(tmp_path, steps=2)
    train(run)
    assert "learning rate goes on" not in capsys.readouterr().out
    train(replace(run, trainer=replace(run.trainer, max_steps=3)))
    said = " ".join(capsys.readouterr().out.split())
    assert "trainer.max_steps was 2 and is 3: the learning rate goes on where a run of 3 has it" in said


def test_a_changed_byte_is_found_and_the_checkpoint_before_is_used(
    finished: Settings, copied: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip_a_byte(checkpoints(copied) / "iter_0000006")
    train(copied)
    said = " ".join(capsys.readouterr().out.split())
    assert "iter_0000006: this checkpoint is damaged (the checksum of __0_0.distcp is another one than" in said
    assert "it is iter_0000006.damaged now, and the one before it is taken" in said
    assert "goes on from step 4" in said
    # Written again, whole, and with the losses that were there before.
    assert checksums.damage(checkpoints(copied) / "iter_0000006") == ""
    losses = toy.metrics(copied)
    assert list(losses) == list(range(1, 9))
    assert [losses[step] for step in range(1, 7)] == list(toy.metrics(finished).values())


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_whole_one(copied: Settings) -> None:
    _flip_a_byte(checkpoints(copied) / "iter_0000006")
    shorter = replace(copied.trainer, max_steps=5)
    train(replace(copied, trainer=shorter, checkpoint=replace(copied.checkpoint, keep_last=1)))
    assert {path.name for path in checkpoints(copied).glob("iter_*")} == {"iter_0000005", "iter_0000006.damaged"}
    assert checksums.damage(checkpoints(copied) / "iter_0000005") == ""
    train(replace(copied, trainer=replace(copied.trainer, max_steps=6)))
    assert (checkpoints(copied) / "iter_0000006").is_dir()


def test_a_run_is_known_by_its_checkpoints_where_its_settings_are_gone(finished: Settings, copied: Settings) -> None:
    (Path(copied.folder) / "whole/settings.json").unlink()
    other = replace(copied, optimizer=replace(copied.optimizer, lr=1.0))
    with pytest.raises(ConfigError, match=r"optimizer.lr: is 1.0, but the run in .* has"):
        train(other)


def test_the_same_layers_cut_into_other_stages_are_the_same_run(copied: Settings) -> None:
    pattern = str(copied.model.layer_pattern)
    folder.refuse_other_run(replace(copied, model=replace(copied.model, layer_pattern=f"{pattern[:2]}|{pattern[2:]}")))
    with pytest.raises(ConfigError, match=r"model\.layer_pattern: is"):
        folder.refuse_other_run(replace(copied, model=replace(copied.model, layer_pattern=pattern[::-1] + "-")))


def test_a_run_whose_folder_was_renamed_goes_on(copied: Settings) -> None:
    (Path(copied.folder) / "whole").rename(Path(copied.folder) / "renamed")
    longer = replace(copied.trainer, max_steps=copied.trainer.max_steps + 1)
    train(replace(copied, name="renamed", trainer=longer))
    assert (Path(copied.folder) / "renamed/checkpoints/iter_0000009").is_dir()


def test_a_file_cut_off_or_missing_is_found_without_reading_the_rest(copied: Settings) -> None:
    path = checkpoints(copied) / "iter_0000006"
    file = path / "__0_0.distcp"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:1000])
    assert checksums.damage(path, share=1, shares=2) == f"__0_0.distcp has 1,000 bytes instead of {size:,}"
    file.unlink()
    assert checksums.damage(path) == "__0_0.distcp is missing"


def test_without_a_whole_checkpoint_nothing_is_begun_anew(copied: Settings) -> None:
    for step in (2, 4, 6):
        _flip_a_byte(folder.checkpoint_folder(checkpoints(copied), step))
    with pytest.raises(ConfigError) as error:
        train(copied)
    assert [problem.place.rpartition("/")[2] for problem in error.value.problems] == [
        "iter_0000006",
        "iter_0000004",
        "iter_0000002",
        "checkpoints",
    ]
    assert folder.checkpoint_steps(checkpoints(copied)) == [2, 4, 6]


def test_an_asynchronous_save_holds_the_same(finished: Settings, tmp_path: Path) -> None:
    run = replace(finished, folder=str(tmp_path), checkpoint=replace(finished.checkpoint, asynchronous=True))
    train(run)
    assert toy.metrics(run) == toy.metrics(finished)
    for step in (2, 4, 6):
        ours, theirs = (folder.checkpoint_folder(checkpoints(it), step) for it in (run, finished))
        assert checksums.damage(ours) == ""
        assert _state(ours) == _state(theirs)
    lines = map(json.loads, (Path(run.folder) / "whole/metrics.jsonl").open())
    assert [line["saved_step"] for line in lines if "save_stall_seconds" in line] == [2, 4, 6]
    assert not list(checkpoints(run).glob(".*"))


def test_an_asynchronous_save_that_fails_is_said_at_a_next_step(
    finished: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.training import writer

    def out_of_space(*_: object) -> None:
        raise SystemExit(1)  # as if the process that writes had been killed

    run = replace(
        finished, folder=str(tmp_path), checkpoint=replace(finished.checkpoint, asynchronous=True, save_interval=3)
    )
    monkeypatch.setattr(writer, "_write", out_of_space)
    with pytest.raises(UserError, match=r"iter_0000003: this checkpoint was not saved \(the process that wrote it was"):
        train(run)
    assert folder.checkpoint_steps(checkpoints(run)) == []
    assert not list(checkpoints(run).glob(".*"))


def test_the_newest_and_every_mth_are_kept(tmp_path: Path) -> None:
    for step in range(10, 110, 10):
        folder.checkpoint_folder(tmp_path, step).mkdir()
    aside = folder.set_aside_old(tmp_path, CheckpointConfig(keep_last=2, keep_every=30))
    assert folder.checkpoint_steps(tmp_path) == [30, 60, 90, 100]
    assert [path.name for path in aside] == [f".saving-old-iter_{step:07d}" for step in (10, 20, 40, 50, 70, 80)]
    assert folder.set_aside_old(tmp_path, CheckpointConfig(keep_last=0)) == []


def test_what_a_killed_save_left_is_removed_at_the_next_start(copied: Settings) -> None:
    left = checkpoints(copied) / ".saving-8-abc"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    train(copied)
    assert not left.exists()


def test_a_run_finds_its_tokenizer_in_its_checkpoint(copied: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(copied, data=replace(copied.data, tokenizer="/gone/tokenizer"))
    (Path(copied.folder) / "whole/settings.json").write_text(
        (Path(copied.folder) / "whole/settings.json").read_text().replace('"byte"', '"/gone/tokenizer"')
    )
    train(moved)
    assert folder.latest_step(checkpoints(moved)) == 8


def test_a_checkpoint_of_a_newer_version_is_refused(copied: Settings) -> None:
    path = checkpoints(copied) / "iter_0000006/versions.json"
    newer = {**json.loads(path.read_text()), "format": provenance.FORMAT + 1, "hybrid-recipes": "9.0"}
    path.write_text(json.dumps(newer))
    with pytest.raises(
        ConfigError, match=r"was written by hybrid-recipes 9\.0, in a newer form than this version reads"
    ):
        train(copied)


def test_a_checkpoint_of_another_model_is_refused_field_by_field(finished: Settings, tmp_path: Path) -> None:
    source = checkpoints(finished) / "iter_0000006"
    model = replace(finished.model, layer_pattern="M-M-", mamba_state_dim=8, ffn_hidden_size=64)
    other = replace(finished, folder=str(tmp_path), name="other", model=model)
    other.checkpoint = replace(other.checkpoint, load=str(source))
    with pytest.raises(ConfigError) as error:
        train(other)
    assert [str(problem) for problem in error.value.problems] == [
        f"model.layer_pattern: is 'M-M-', but the checkpoint '{source}' has 'M-M*'",
        f"model.ffn_hidden_size: is 64, but the checkpoint '{source}' has 128",
        f"model.mamba_state_dim: is 8, but the checkpoint '{source}' has 16",
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "model.safetensors"], "is a Hugging Face checkpoint; `hybrid convert"),
        (
            ["iter_0000001/mp_rank_00/model_optim_rng.pt"],
            "is a checkpoint of Megatron's legacy format; `hybrid convert",
        ),
        (["metadata.json", "__0_0.distcp"], "is a torch_dist checkpoint without the settings of a run of ours"),
    ],
)
def test_a_foreign_checkpoint_is_named_with_the_way_out(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=said):
        folder.find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("file", [folder.SETTINGS_FILE, folder.JOB_FILE])
def test_a_run_without_a_checkpoint_is_a_run(tmp_path: Path, file: str) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / file).write_text("{}")
    with pytest.raises(ConfigError, match=r"^tiny: this run has no finished checkpoint yet; the first comes after"):
        folder.find_checkpoint("tiny", str(tmp_path))
    with pytest.raises(ConfigError, match=r"did you mean tiny\? runs here: tiny"):
        folder.find_checkpoint("tinny", str(tmp_path))


def _flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _state(path: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, bit for bit, read by torch alone."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    described = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
