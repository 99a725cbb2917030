"""`python -m cli`: the `hybrid` command where it is not on the PATH, and under torchrun."""

from cli.main import run

run()
