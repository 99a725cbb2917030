"""What a write that failed is: the user's choice of a place, or a disk that is full."""

import errno
import os

import pytest

from hybrid.errors import ConfigError, unwritable


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_a_place_that_takes_no_files_is_a_mistake_and_a_full_disk_is_none(number: int, code: int) -> None:
    error = unwritable("runs/tiny", "it cannot be written", OSError(number, os.strerror(number)), "go elsewhere")
    assert str(error) == f"runs/tiny: it cannot be written: {os.strerror(number)}; go elsewhere"
    assert (error.exit_code, isinstance(error, ConfigError)) == (code, code == 2)
