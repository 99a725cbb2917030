"""The example of docs/finetuning.md, smaller: a fine-tuned `tiny` answers in the form that its prompt asks for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_pretrain import ROOT, hybrid

SCRIPT = str(ROOT / "docs/examples/instructions.py")


def instructions(folder: Path, what: str, path: str) -> str:
    """Run the example's script, which needs nothing but Python."""
    command = [sys.executable, "-I", SCRIPT, what, path]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_fine_tuned_tiny_answers_in_the_form_that_is_asked_for(tmp_path: Path) -> None:
    instructions(tmp_path, "write", "instructions")
    asked = tmp_path / "instructions/held_out.jsonl"
    asked.write_text("".join(asked.read_text().splitlines(keepends=True)[:100]))
    small = ("data.cache=cache", "trainer.eval_interval=0", "trainer.eval_steps=1", "trainer.micro_batch_size=8")
    commands = [
        ("pretrain", "tiny", "trainer.max_steps=60", *small),
        (
            *("finetune", "tiny", "checkpoint=tiny", "data.path=instructions/train.jsonl", *small),
            *("trainer.max_steps=150", "trainer.global_batch_size=8", "optimizer.lr=2e-3", "optimizer.warmup_steps=10"),
        ),
        ("generate", "tiny_finetune", "--batch", str(asked), "--output", "answers.jsonl", "--temperature", "0"),
    ]
    for command in commands:
        done = hybrid(tmp_path, *command)
        assert done.returncode == 0, done.stderr
    said = instructions(tmp_path, "check", "answers.jsonl")
    share = re.search(r"all: 100 asked, ([\d.]+)% in the right form", said)
    # There are five forms: one answer in five would have the right one by chance.
    assert share and float(share[1]) >= 90, said
