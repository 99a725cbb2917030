"""Fine-tuning runs: packed rows with unequal numbers of learned tokens, interrupted, and from another run's weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import Settings
from hybrid.training.loop import train
from tests import toy


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts whose responses are between one and twelve letters long."""
    path = tmp_path_factory.mktemp("examples") / "letters.jsonl"
    records = [{"prompt": f"{i}:", "response": "ab" * (1 + i % 6)} for i in range(150)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(folder: Path, examples: Path, name: str, **trainer: Any) -> Settings:
    return toy.settings(
        folder,
        name,
        steps=4,
        model={"init_std": 0.1},
        data={"source": "sft", "path": str(examples), "sequence_length": 64, "split": [9.0, 1.0, 0.0]},
        optimizer={"lr": 3e-3},
        trainer=trainer,
    )


def test_a_token_counts_the_same_in_whatever_micro_batch_it_is(examples: Path, tmp_path: Path) -> None:
    singly, together = (run(tmp_path, examples, f"of{size}", micro_batch_size=size) for size in (1, 4))
    train(singly)
    train(together)
    for key in ("loss", "grad_norm", "bits_per_byte"):
        # float32: the same sums in another order, over four steps.
        assert toy.metrics(singly, key) == pytest.approx(toy.metrics(together, key), rel=1e-4), key
    assert toy.metrics(singly, "validation_loss")


def test_the_batch_grows_and_a_resumed_run_grows_it_alike(examples: Path, tmp_path: Path) -> None:
    growing = {"micro_batch_size": 2, "global_batch_size": 6, "rampup_batch_size": [2, 2, 8], "max_steps": 6}
    whole = run(tmp_path, examples, "whole", **growing)
    train(whole)
    assert toy.metrics(whole, "samples") == {1: 2, 2: 4, 3: 8, 4: 14, 5: 20, 6: 26}
    # Four of the six steps, with the schedule of all six, and then the rest.
    part = replace(whole, name="part", optimizer=replace(whole.optimizer, decay_samples=26))
    train(replace(part, trainer=replace(part.trainer, max_steps=4)))
    train(part)
    assert toy.metrics(part) == toy.metrics(whole)


def test_a_run_starts_from_weights_and_says_what_it_reads(
    examples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = toy.settings(tmp_path, "first", steps=2, model={"init_std": 0.1})
    train(first)
    tuned = run(tmp_path, examples, "tuned")
    tuned.checkpoint.load = str(tmp_path / "runs" / "first")
    train(tuned)
    said = capsys.readouterr().out
    assert "train 135 examples in" in said and "validation 15 examples in" in said
    losses = toy.metrics(tuned)
    assert losses[4] < losses[1]
