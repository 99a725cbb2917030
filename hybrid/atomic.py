"""Files that are there whole or as they were, whenever the process that writes them is killed."""

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file beside `path`, in UTF-8, and give it that name when it is complete. Raises OSError."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
