"""Fine-tuning data from files to batches, and what is said of files that cannot be used."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from hybrid.config import Settings
from hybrid.data import sft
from hybrid.data.datasets import batches, build_datasets
from hybrid.data.inputs import BadDocument
from hybrid.data.tokenizer import ByteTokenizer
from hybrid.errors import ConfigError, UserError
from tests import toy


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+{i}=", "response": str(2 * i)} for i in range(start, start + count)]


def run(tmp_path: Path, path: Path, **data: Any) -> Settings:
    values = {"source": "sft", "path": f"'{path}'", "sequence_length": 32, "split": [8.0, 1.0, 1.0], **data}
    return toy.settings(tmp_path, data=values)


def build(settings: Settings, samples: int = 20):
    return build_datasets(settings, ByteTokenizer(), train_samples=samples)


def text(row: dict[str, torch.Tensor], learned: bool) -> list[str]:
    """The text of each sequence of a row, or what is learned of it; `$` ends a document."""
    found = []
    for number in range(int(row["seq_idx"].max()) + 1):
        inside = row["seq_idx"] == number
        labels = row["labels"][inside & (row["loss_mask"] > 0)] if learned else row["tokens"][inside]
        found.append("".join(chr(i) if i < 256 else "$" for i in labels.tolist()))
    return found


def test_prompts_are_given_and_responses_learned(tmp_path):
    settings = run(tmp_path, write(tmp_path / "a.jsonl", pairs(3, 10)), split=[1.0, 0.0, 0.0])
    datasets = build(settings, 1)
    row = datasets.train[0]
    assert sorted(text(row, learned=False)[:3]) == ["10+10=20", "11+11=22", "12+12=24"]
    assert sorted(text(row, learned=True)[:3]) == ["20$", "22$", "24$"]
    assert datasets.notes == ["train 3 examples in 1 sequences of 32 (75.0% full)"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_conversations_in_every_kind_of_file(tmp_path, name):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path, records = tmp_path / name, [{"messages": messages}]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write(path, records)
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    row = build(run(tmp_path, path, split=[1.0, 0.0, 0.0]), 1).train[0]
    assert text(row, learned=False)[0] == "User:\nhi\nAssistant:\nho" and text(row, learned=True)[0] == "ho$"


def test_shares_of_one_file_and_none_in_two_of_them(tmp_path):
    settings = run(tmp_path, write(tmp_path / "a.jsonl", [*pairs(20), *pairs(20)]))
    datasets = build(settings, 100)

    def responses(dataset, rows):
        return {learned for i in range(rows) for learned in text(dataset[i], learned=False) if "=" in learned}

    train = responses(datasets.train, 60)
    held = responses(datasets.validation["validation"], len(datasets.validation["validation"]))  # pyright: ignore
    assert len(datasets.test) == 1 and held
    assert not train & held
    assert [note.split(" in ")[0] for note in datasets.notes] == [
        "train 32 examples",
        "validation 4 examples",
        "test 4 examples",
    ]


def test_files_to_validate_on(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(9))
    settings = run(tmp_path, path, validation_path=str(write(tmp_path / "b.jsonl", pairs(2, 50))))
    datasets = build(settings)
    assert list(datasets.validation) == ["validation"] and not datasets.test
    assert sorted(text(datasets.validation["validation"][0], learned=False)[:2]) == ["50+50=100", "51+51=102"]


def test_it_is_encoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", pairs(9))
    settings = run(tmp_path, path)
    folder = sft.prepare(settings.data, ByteTokenizer(), quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_encode", None)
        assert sft.prepare(settings.data, ByteTokenizer(), quiet=True) == folder
    write(path, pairs(10))
    again = sft.prepare(settings.data, ByteTokenizer(), quiet=True)
    assert again != folder
    (again / "examples.bin").write_bytes(b"cut short")
    assert sft.prepare(settings.data, ByteTokenizer(), quiet=True) == again
    assert len((again / "examples.bin").read_bytes()) > 9


def test_batches_of_several_ranks_and_workers_are_the_rows_in_order(tmp_path):
    settings = run(tmp_path, write(tmp_path / "a.jsonl", pairs(60)), split=[1.0, 0.0, 0.0])
    dataset = build(settings, 24).train
    for rank in (0, 1):
        loaded = batches(
            dataset,
            consumed_samples=4,
            micro_batch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=2,
            num_workers=2,
        )
        for k, batch in enumerate(loaded):
            first = 4 + (2 * k + rank) * 2
            assert torch.equal(batch["tokens"], torch.stack([dataset[first]["tokens"], dataset[first + 1]["tokens"]]))
        assert len(loaded) == 5


def test_examples_that_are_too_long_are_refused_truncated_or_dropped(tmp_path):
    records = [*pairs(18), {"prompt": "p" * 40, "response": "lost"}, {"prompt": "p" * 25, "response": "r" * 20}]
    settings = run(tmp_path, write(tmp_path / "a.jsonl", records), split=[1.0, 0.0, 0.0])
    refused = "data.sequence_length: is 32, room for examples of 33 tokens, but 2 of 20 examples are longer, "
    refused += "the longest 46 tokens; set it to at least 45, or data.too_long to 'truncate' or 'drop'"
    with pytest.raises(ConfigError, match=refused):
        build(settings)
    dropped = build(replace(settings, data=replace(settings.data, too_long="drop")))
    assert "train 18 examples" in dropped.notes[0] and dropped.notes[0].endswith(
        "; 2 of 20 examples were longer and dropped"
    )
    cut = build(replace(settings, data=replace(settings.data, too_long="truncate")))
    assert "train 19 examples" in cut.notes[0]
    assert cut.notes[0].endswith(
        "; 2 of 20 examples were longer and truncated, 1 of them left out, as nothing to learn was left"
    )
    assert any("r" * 7 in learned for i in range(6) for learned in text(cut.train[i], learned=True))
    assert dropped.fingerprint != cut.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", None, ConfigError, "data.path: '.*a.jsonl' cannot be read: no such file"),
        ("a.jsonl", "", ConfigError, "'.*a.jsonl' is empty"),
        ("a.jsonl", "\n\n", ConfigError, "data.path: there are no examples in these files"),
        ("a.txt", "text", ConfigError, "'.*a.txt' is neither JSON lines"),
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"', BadDocument, "line 2: this is not JSON"),
        ("a.jsonl", '{"text": "a"}', BadDocument, "line 1: there is neither 'messages' nor 'prompt'"),
        (
            "a.jsonl",
            '{"prompt": "a\\ud800", "response": "b"}',
            BadDocument,
            "line 1: a text holds half of a surrogate pair",
        ),
        (
            "a.jsonl",
            '\n{"messages": [{"role": "user", "content": "a"}]}',
            BadDocument,
            "line 2: there is no message of",
        ),
    ],
)
def test_files_that_cannot_be_used_are_said_before_the_first_step(tmp_path, name, content, kind, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(kind, match=message) as error:
        build(run(tmp_path, tmp_path / name))
    assert isinstance(error.value, UserError)
    assert not list((tmp_path / "cache").rglob("*.unfinished"))


def test_examples_that_are_the_same_are_on_one_side(tmp_path):
    examples = write(tmp_path / "a.jsonl", pairs(3) * 10)
    split = run(tmp_path, examples)
    split.data.split = [50, 50, 0]
    found = build(split)
    rows = (found.train[0], found.validation["validation"][0])
    train, held_out = ({learned for learned in text(row, learned=False) if "=" in learned} for row in rows)
    assert train and held_out and not train & held_out
    with pytest.raises(ConfigError, match=r"data.split: leaves nothing to train on: the 30 examples are one and"):
        split.data.path = str(write(tmp_path / "b.jsonl", pairs(1) * 30))
        build(split)


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.split: leaves none of the 2 examples to train on"):
        build(run(tmp_path, write(tmp_path / "a.jsonl", pairs(2))))
