import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid import config
from hybrid.data import datasets
from hybrid.data.indexed import IndexedWriter
from hybrid.data.prepare_files import prepare_files
from hybrid.data.tokenizer import ByteTokenizer, load_tokenizer
from hybrid.errors import ConfigError, UserError

tokenizer = ByteTokenizer()


def run_settings(folder: Path, **data) -> config.Settings:
    return config.Settings(
        name="test",
        model=config.ModelConfig(layer_pattern="M-", vocab_size=257),
        parallel=config.ParallelConfig(),
        data=config.DataConfig(**{"cache": str(folder / "cache"), "sequence_length": 16, "split": [80, 20, 0]} | data),
        optimizer=config.OptimizerConfig(),
        trainer=config.TrainerConfig(max_steps=10),
        checkpoint=config.CheckpointConfig(),
    )


def write(prefix: Path, documents: list[list[int]]) -> str:
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for document in documents:
        writer.add(np.array(document, np.uint16), np.array([len(document)], np.int32))
    writer.close()
    return str(prefix)


def counting(documents: int, length: int, first: int = 0) -> list[list[int]]:
    """Documents whose tokens tell which document they are of."""
    return [[first + i] * length for i in range(documents)]


def collect(loader) -> torch.Tensor:
    """Tokens of all samples, (samples, sequence)."""
    return torch.cat([batch["tokens"] for batch in loader])


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(0, 256), min_size=2, max_size=100), length=st.integers(1, 40))
def test_held_out_data_gives_every_token_but_the_first_as_a_label_once(tokens, length):
    held_out = datasets.HeldOut(np.array(tokens, np.uint16), length, filler=256)
    samples = [held_out[i] for i in range(len(held_out))]
    labels = [label for s in samples for label, mask in zip(s["labels"], s["loss_mask"], strict=True) if mask]
    inputs = [token for s in samples for token, mask in zip(s["tokens"], s["loss_mask"], strict=True) if mask]
    assert labels == tokens[1:]
    assert inputs == tokens[:-1]
    assert all(s["tokens"].shape == s["labels"].shape == s["loss_mask"].shape == (length,) for s in samples)


def test_a_part_of_held_out_data_is_taken_at_even_distances():
    held_out = datasets.HeldOut(np.arange(101), 10, filler=0, samples=3)
    assert [held_out[i]["tokens"][0].item() for i in range(len(held_out))] == [0, 30, 60]


def test_held_out_data_gives_the_sequences_that_upstreams_dataset_gives(tmp_path):
    prefix = write(tmp_path / "x", [[i % 256] * (5 + i) for i in range(20)])
    run = run_settings(tmp_path, source="indexed", path=prefix, validation_path=prefix)
    data = datasets.build_datasets(run, tokenizer, train_samples=1)
    document_order = data.train.document_index  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(document_order) == list(range(20))
    data.train.document_index = np.arange(20, dtype=np.int32)  # pyright: ignore[reportAttributeAccessIssue]
    from megatron.core.datasets import helpers

    index = helpers.build_sample_idx(data.train.dataset.sequence_lengths, np.arange(20, dtype=np.int32), 16, 1, 290)  # pyright: ignore
    data.train.sample_index = index  # pyright: ignore[reportAttributeAccessIssue]
    data.train.shuffle_index = np.arange(len(index) - 1)  # pyright: ignore[reportAttributeAccessIssue]
    (held_out,) = data.validation.values()
    for i in range(len(index) - 1):
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(data.train[i][key], held_out[i][key]), (i, key)


def test_the_fewest_bits_per_byte_are_those_of_the_text(tmp_path):
    """With a loss of ln 256 on every label, a byte costs 8 bits, and the end of a document is paid for by the bytes."""
    prefix = write(tmp_path / "x", [[*b"some text", 256], [*b"more", 256]])
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "y", counting(9, 9)), validation_path=prefix)
    (held_out,) = datasets.build_datasets(run, tokenizer, train_samples=1).validation.values()
    batches = list(datasets.batches(held_out, micro_batch_size=2, fill_up=True))
    nats = sum(float((batch["loss_mask"] * math.log(256)).sum()) for batch in batches)
    weights = torch.from_numpy(tokenizer.token_bytes())
    text_bytes = sum(int((weights[batch["labels"]] * batch["loss_mask"]).sum()) for batch in batches)
    assert text_bytes == len("some text" + "more") - 1  # the first has no context
    assert nats / math.log(2) / text_bytes == pytest.approx(8 * (12 + 2) / 12)


class Numbers(torch.utils.data.Dataset):
    """Sample i holds i; None a masked one."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return {"tokens": torch.tensor([-1 if index is None else index])}


@given(samples=st.integers(0, 60), consumed=st.integers(0, 20), micro=st.integers(1, 4), ranks=st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_ranks_together_read_every_sample_once_and_in_order(samples, consumed, micro, ranks):
    loaders = [
        datasets.batches(
            Numbers(samples),
            consumed_samples=consumed,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            fill_up=True,
        )
        for rank in range(ranks)
    ]
    steps = list(zip(*loaders, strict=True))  # the same number of micro-batches on every rank
    read = [i for step in steps for batch in step for i in batch["tokens"].flatten().tolist()]
    assert [i for i in read if i >= 0] == list(range(consumed, samples))
    assert len(steps) == len(loaders[0])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_loader_goes_on_with_the_very_next_sample(tmp_path, workers):
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "x", counting(50, 20)))
    run.data.split = [1, 0, 0]
    train = datasets.build_datasets(run, tokenizer, train_samples=100).train
    whole = collect(datasets.batches(train, micro_batch_size=4))
    rest = collect(datasets.batches(train, micro_batch_size=2, consumed_samples=42, num_workers=workers))
    assert torch.equal(whole[42 : 42 + len(rest)], rest) and len(rest) >= 58


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_torchs_random_state_as_it_was(workers):
    state = torch.get_rng_state()
    list(datasets.batches(Numbers(8), micro_batch_size=2, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is known on Linux only")
def test_a_worker_outlives_signals_to_the_whole_job_but_not_its_parents():
    loading = iter(datasets.batches(Numbers(1000), micro_batch_size=1, num_workers=1))
    next(loading)
    (worker,) = loading._workers  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert [next(loading)["tokens"].item() for _ in range(100)] == list(range(1, 101))
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_training_never_sees_held_out_documents(tmp_path):
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "x", counting(50, 20)), split=[80, 10, 10])
    data = datasets.build_datasets(run, tokenizer, train_samples=200)
    seen = set(collect(datasets.batches(data.train, micro_batch_size=10)).flatten().tolist())
    assert seen == set(range(40))
    for held_out, documents in ((data.validation, range(40, 45)), (data.test, range(45, 50))):
        tokens = collect(datasets.batches(held_out["x"], micro_batch_size=1))
        assert set(tokens.flatten().tolist()) - {256} == set(documents)


def test_a_blend_takes_samples_by_weight(tmp_path):
    a, b = write(tmp_path / "a", counting(9, 50)), write(tmp_path / "b", counting(9, 500, first=100))
    run = run_settings(tmp_path, source="indexed", path=f"3 {a} 1 {b}", validation_path=f"{a} {b}")
    data = datasets.build_datasets(run, tokenizer, train_samples=400)
    tokens = collect(datasets.batches(data.train, micro_batch_size=10))[:400]
    assert (tokens[:, 0] < 100).sum() == pytest.approx(300, abs=1)
    assert list(data.validation) == ["a", "b"]
    run.data.path = f"{a} {b}"  # without weights: by size
    tokens = collect(
        datasets.batches(datasets.build_datasets(run, tokenizer, train_samples=440).train, micro_batch_size=1)
    )
    assert (tokens[:440, 0] < 100).sum() == pytest.approx(40, abs=1)


def test_a_blend_of_many_small_shares_works(tmp_path):
    prefixes = [write(tmp_path / str(i), counting(2, 20, first=i)) for i in range(30)]
    blend = " ".join(f"{1 / (1 + i)} {prefix}" for i, prefix in enumerate(prefixes))
    run = run_settings(tmp_path, source="indexed", path=blend, split=[1, 0, 0])
    for samples in (1, 7, 100):
        train = datasets.build_datasets(run, tokenizer, train_samples=samples).train
        assert len(collect(datasets.batches(train, micro_batch_size=1))) >= samples


def test_data_made_with_another_tokenizer_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "x.txt").write_text("some text " * 50)
    other = load_tokenizer(str(tokenizer_folder / "huggingface"))
    prepare_files([str(tmp_path / "x.txt")], tokenizer=other, output=str(tmp_path / "x"), workers=1)
    run = run_settings(tmp_path, source="indexed", path=str(tmp_path / "x"), split=[1, 0, 0])
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: 'byte' is not the tokenizer that '.*/x' was made with"):
        datasets.build_datasets(run, tokenizer, train_samples=1)
    run.model.vocab_size = other.vocab_size
    assert len(datasets.build_datasets(run, other, train_samples=1).train) >= 1  # pyright: ignore


def test_text_is_prepared_read_and_cached(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(10):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i} " * 20)
    run = run_settings(tmp_path, source="text", path=str(tmp_path / "texts"))
    first = datasets.build_datasets(run, tokenizer, train_samples=100)
    again = datasets.build_datasets(run, tokenizer, train_samples=100)
    a, b = (collect(datasets.batches(data.train, micro_batch_size=10)) for data in (first, again))
    assert torch.equal(a, b) and "text" in tokenizer.decode(a[0].tolist())
    assert [path.name for path in (tmp_path / "cache" / "indices").iterdir() if path.name.endswith("unfinished")] == []
    run.trainer.seed += 1
    other = datasets.build_datasets(run, tokenizer, train_samples=100)
    assert not torch.equal(a, collect(datasets.batches(other.train, micro_batch_size=10)))


def test_data_made_anew_at_the_same_path_is_not_read_with_the_old_index(tmp_path):
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "x", counting(50, 20)), split=[1, 0, 0])
    old = datasets.build_datasets(run, tokenizer, train_samples=50)
    write(tmp_path / "x", counting(20, 30, first=100))
    new = datasets.build_datasets(run, tokenizer, train_samples=50)
    assert old.fingerprint != new.fingerprint
    assert set(collect(datasets.batches(new.train, micro_batch_size=5)).flatten().tolist()) == set(range(100, 120))


def test_mock_data_needs_no_file(tmp_path):
    data = datasets.build_datasets(
        run_settings(tmp_path, source="mock"), tokenizer, train_samples=20, validation_samples=3
    )
    assert next(iter(datasets.batches(data.train, micro_batch_size=5)))["tokens"].shape == (5, 16)
    assert len(data.validation["mock"]) == 3


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    run = run_settings(tmp_path, source="mock")
    run.model.vocab_size = 128
    with pytest.raises(ConfigError, match=r"^model\.vocab_size: the embedding has 128 rows.*257.*vocab_size=257"):
        datasets.build_datasets(run, tokenizer, train_samples=1)


def unusable(tmp_path: Path, write=write) -> dict[str, tuple[dict, str]]:
    good = write(tmp_path / "good", counting(10, 20))
    other = write(tmp_path / "other", [[50256] * 20])
    return {
        "missing": ({"path": str(tmp_path / "none")}, r"^data\.path: there is no file '.*none\.idx'"),
        "no path": ({"path": None}, r"^data\.path: .*needs the path"),
        "too short": (
            {"sequence_length": 160},
            r"^data\.sequence_length: '.*good' has 160 training tokens; .* 160 \+ 1",
        ),
        "share too small": ({"split": [99, 1, 0]}, r"^data\.split: .*validation is less than one of the 10 documents"),
        "foreign tokens": (
            {"path": other},
            r"^data\.path: '.*other' holds token 50256, .* 384 rows",
        ),
        "two problems": (
            {"validation_path": "nowhere", "test_path": other},
            r"^data\.validation_path: .*nowhere.*\ndata\.test_path: .*50256",
        ),
        "half a blend": ({"path": f"1 {good} {good}"}, r"^data\.path: .*neither prefixes nor pairs"),
        "no weight": ({"path": f"0 {good}"}, r"^data\.path: .*weight above 0"),
        "open quotation": ({"path": f"'{good}"}, r"^data\.path: .*quotation mark"),
    }


@pytest.mark.parametrize("case", unusable(Path("nowhere"), write=lambda *args: "").keys())
def test_unusable_indexed_data_is_said_before_the_first_step(tmp_path, case):
    change, message = unusable(tmp_path)[case]
    run = run_settings(tmp_path, **{"source": "indexed", "path": str(tmp_path / "good")} | change)
    with pytest.raises(ConfigError, match=message):
        datasets.build_datasets(run, tokenizer, train_samples=10)


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "cache").touch()
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "x", counting(10, 20)))
    with pytest.raises(UserError, match=r"cannot write to '.*cache.*'.*data\.cache"):
        datasets.build_datasets(run, tokenizer, train_samples=10)


def test_a_full_disk_leaves_no_index_behind(tmp_path, monkeypatch):
    run = run_settings(tmp_path, source="indexed", path=write(tmp_path / "x", counting(10, 20)), split=[1, 0, 0])

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match=r"cannot write to '.*indices': no space left on device; .*data\.cache"):
            datasets.build_datasets(run, tokenizer, train_samples=10)
    assert list((tmp_path / "cache" / "indices").iterdir()) == []
    datasets.build_datasets(run, tokenizer, train_samples=10)


RANK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_datasets as here
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
run = here.run_settings(Path(sys.argv[2]), source="text", path=sys.argv[2] + "/texts")
train = here.datasets.build_datasets(run, here.tokenizer, train_samples=40).train
torch.save(here.collect(here.datasets.batches(train, micro_batch_size=2, data_parallel_rank=rank,
                                              data_parallel_size=2)), f"{sys.argv[2]}/{rank}.pt")
run.data.path = "nowhere"
try:
    here.datasets.build_datasets(run, here.tokenizer, train_samples=40)
except here.ConfigError as error:
    sys.stdout.write(f"{rank} {error}\\n")  # at once: both write into one pipe
"""


@pytest.mark.multiprocess
def test_two_ranks_share_one_preparation_and_raise_the_same_error(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(10):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i} " * 20)
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "rank.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    run = run_settings(tmp_path, source="text", path=str(tmp_path / "texts"))
    alone = collect(
        datasets.batches(datasets.build_datasets(run, tokenizer, train_samples=40).train, micro_batch_size=2)
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    together = torch.stack([r.unflatten(0, (-1, 2)) for r in ranks], dim=1).flatten(0, 2)
    assert torch.equal(together, alone[: len(together)]) and len(together) >= 40
    assert done.stderr.count("data prepared") == 1
    assert sorted(done.stdout.splitlines()) == [f"{rank} data.path: there is no folder 'nowhere'" for rank in range(2)]
