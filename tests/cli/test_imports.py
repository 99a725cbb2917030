"""The line between what describes and what runs: these verbs import none of the heavy packages."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "megatron", "nemo_run", "transformers", "numpy"}
PROGRAM = """
import sys
from cli.main import run
try:
    run(sys.argv[1:])
finally:
    print("IMPORTED", *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "also"),
    [
        (["--help"], {"fiddle", "rich", "yaml"}),
        (["list"], {"fiddle", "rich", "yaml"}),
        (["show", "hybrid_8b", "model.layer_pattern=M-M*-"], {"yaml"}),
        (["show", "hybrid_8b", "--format", "yaml"], set()),
        (["diff", "hybrid_8b", "hybrid_800m"], {"yaml"}),
        (["plan", "hybrid_8b"], {"yaml"}),
    ],
)
def test_describing_verbs_import_nothing_heavy(arguments: list[str], also: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    imported = set(done.stderr.rpartition("IMPORTED")[2].split())
    assert "cli" in imported
    assert not imported & (HEAVY | also)
