import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.data.indexed import IndexedWriter, read_index, token_dtype
from hybrid.errors import ConfigError


def write(prefix, documents, vocab_size=257):
    dtype = token_dtype(vocab_size)
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add(np.array(document, dtype), np.array([len(document)], np.int32))
    return writer.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 256), min_size=1), min_size=1), st.sampled_from([257, 65499, 65500, 256000]))
def test_files_are_those_of_upstreams_builder(tmp_path_factory, documents, vocab_size):
    upstream = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    folder = tmp_path_factory.mktemp("indexed")
    write(folder / "ours", documents, vocab_size)
    builder = upstream.IndexedDatasetBuilder(f"{folder}/theirs.bin", dtype=upstream.DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{folder}/theirs.idx")
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()


def test_an_index_reads_back(tmp_path):
    write(tmp_path / "x", [[1, 2, 3], [4]])
    index = read_index(tmp_path / "x", "data.path")
    assert (index.tokens, index.lengths.tolist(), index.documents.tolist()) == (4, [3, 1], [0, 1, 2])


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix: prefix.with_suffix(".idx").unlink(), "there is no file '.*x.idx'"),
        (lambda prefix: prefix.with_suffix(".bin").unlink(), "there is no file '.*x.bin'"),
        (lambda prefix: cut(prefix.with_suffix(".idx"), 0), "not an index of Megatron's format"),
        (lambda prefix: cut(prefix.with_suffix(".idx"), 20), "not an index of Megatron's format"),
        (lambda prefix: cut(prefix.with_suffix(".idx"), 60), "has 60 bytes instead of 82"),
        (lambda prefix: cut(prefix.with_suffix(".bin"), 4), "has 4 bytes, but its index speaks of 8"),
        (lambda prefix: prefix.with_suffix(".idx").write_bytes(b"x" * 99), "not an index of Megatron's format"),
        (lambda prefix: write(prefix, []), "holds no tokens"),
    ],
)
def test_files_that_do_not_match_are_one_clear_sentence(tmp_path, damage, message):
    write(tmp_path / "x", [[1, 2, 3], [4]])
    damage(tmp_path / "x")
    with pytest.raises(ConfigError, match=rf"^data\.path: .*{message}"):
        read_index(tmp_path / "x", "data.path")
