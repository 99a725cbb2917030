"""Checkpoints of torch.distributed.checkpoint (DCP): global tensors in chunks, and an index of them.

FOLDER/.metadata           a pickle: name, shape and chunks of every tensor, and where each chunk lies
FOLDER/__R_W.distcp        chunks and objects, each a file of torch.save inside

(torch/distributed/checkpoint/{metadata,filesystem}.py) Reading needs neither torch nor a process group.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import pickles, torchfile
from converters.pickles import Inert
from converters.tensors import ITEM_SIZES, Blob, Shape, Tensor, narrow, place, stored
from converters.torchfile import Files, Plan, bytes_plan
from hybrid.errors import CheckpointError

INDEX = ".metadata"


def load(folder: Path, allow: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Blob]]:
    """Return the tensors of a folder and where its objects lie, by key. Raises CheckpointError for missing, truncated
    or contradictory files."""
    path = folder / INDEX
    content = pickles.load(path.read_bytes(), str(path), allow=allow)
    described = content.get("state_dict_metadata") if isinstance(content, Inert) else None
    stored_at = content.get("storage_data") if isinstance(content, Inert) else None
    if not isinstance(described, dict) or not isinstance(stored_at, dict):
        raise CheckpointError(f"{path} is no index of a distributed checkpoint")
    sizes: dict[str, int] = {}
    blobs: dict[tuple[str, Shape | None], Blob] = {}
    for key, info in stored_at.items():
        name, start = key.get("fqn"), key.get("offset")
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if info.get("transform_descriptors"):
            raise CheckpointError(f"{folder / file}: its chunks are transformed ({info.get('transform_descriptors')})")
        if file not in sizes:
            if Path(file).name != file:
                raise CheckpointError(f"{path} names a file outside of its folder: {file}")
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file} is missing")
            sizes[file] = (folder / file).stat().st_size
        if offset + length > sizes[file]:
            raise CheckpointError(
                f"{folder / file} is truncated: it has {sizes[file]} bytes, {name} ends at {offset + length}"
            )
        blobs[name, None if start is None else _ints(start)] = Blob(folder / file, offset, length)
    tensors: dict[str, Tensor] = {}
    objects: dict[str, Blob] = {}
    for name, entry in described.items():
        if entry.name == "BytesStorageMetadata":
            if (name, None) in blobs:
                objects[name] = blobs[name, None]
            continue
        tensors[name] = _entry(path, name, entry, blobs)
    return tensors, objects


def load_object(blob: Blob, allow: Iterable[str] = ()) -> Any:
    """Return an object; megatron-core stores each as a list of one."""
    content = torchfile.load(blob.path, allow, blob.start, blob.length)
    return content[0] if isinstance(content, list) and content else None


def plan(
    entries: Mapping[str, Tensor], dims: Mapping[str, int | None], objects: Mapping[str, Any], chunks: int
) -> Files:
    """Plan the files of these tensors and objects. Tensors are cut into `chunks` along their `dims`, where that comes
    out even (None: not at all), and chunk i of every tensor goes into file i."""
    files: list[list[tuple[str, Shape, Tensor | list[Any]]]] = [[] for _ in range(chunks)]
    for key, tensor in entries.items():
        for index, (start, chunk) in enumerate(_chunks(tensor, dims[key], chunks)):
            files[index % chunks].append((key, start, chunk))
    files[0] += [(key, (), [value]) for key, value in objects.items() if value is not None]
    # Objects that are None are the same few bytes, stored once.
    files[0] += [("", (), [None])] if None in objects.values() else []
    empty = [key for key, value in objects.items() if value is None]
    result: Files = {}
    places: list[tuple[str, Shape, Shape | None, str, str, int, int]] = []
    for index, items in enumerate(files):
        name = f"__{index}_0.distcp"
        blobs: list[Plan] = []
        offset = 0
        for key, start, content in items:
            blob = torchfile.plan(content, offset)
            shape = content.shape if isinstance(content, Tensor) else None
            dtype = content.dtype if isinstance(content, Tensor) else ""
            places += [(known, start, shape, dtype, name, offset, blob.size) for known in ([key] if key else empty)]
            blobs.append(blob)
            offset += blob.size
        result[name] = torchfile.joined(blobs)
    result[INDEX] = bytes_plan(_index_pickle({key: tensor.shape for key, tensor in entries.items()}, places))
    return result


def _chunks(tensor: Tensor, dim: int | None, count: int) -> list[tuple[Shape, Tensor]]:
    """Consecutive parts of a tensor along `dim` with their start index; one part if it cannot be cut evenly."""
    zero = (0,) * len(tensor.shape)
    if dim is None or count == 1 or tensor.shape[dim] % count:
        return [(zero, tensor)]
    length = tensor.shape[dim] // count
    return [
        (
            tuple(index * length if d == dim else 0 for d in range(len(zero))),
            narrow(tensor, dim, index * length, length),
        )
        for index in range(count)
    ]


def _index_pickle(
    sizes: Mapping[str, Shape], places: list[tuple[str, Shape, Shape | None, str, str, int, int]]
) -> bytes:
    """The `.metadata` of chunks (key, start, shape, number format, file, offset, length), as torch reads it."""
    import pickle

    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

    described: dict[str, Any] = {}
    where: dict[Any, Any] = {}
    for key, start, shape, dtype, file, offset, length in places:
        if shape is None:
            described[key] = metadata.BytesStorageMetadata()
            where[metadata.MetadataIndex(key)] = _StorageInfo(file, offset, length)
            continue
        if key not in described:
            properties = metadata.TensorProperties(dtype=getattr(torch, dtype))
            described[key] = metadata.TensorStorageMetadata(properties, torch.Size(sizes[key]), [])
        described[key].chunks.append(metadata.ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
        where[metadata.MetadataIndex(key, start)] = _StorageInfo(file, offset, length)
    index = metadata.Metadata(
        state_dict_metadata=described,
        storage_data=where,
        storage_meta=metadata.StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    return pickle.dumps(index)


def _entry(path: Path, name: str, entry: Inert, blobs: Mapping[tuple[str, Shape | None], Blob]) -> Tensor:
    dtype = entry.get("properties").state[0].name
    if dtype not in ITEM_SIZES:
        raise CheckpointError(f"{path}: {name} has the number format {dtype}, which is not read")
    shape = _ints(entry.get("size"))
    parts: list[tuple[Shape, Tensor]] = []
    for chunk in entry.get("chunks"):
        start = _ints(chunk.get("offsets"))
        if (name, start) not in blobs:
            raise CheckpointError(f"{path}: the part of {name} at {list(start)} is in no file")
        parts.append((start, stored(blobs[name, start], 0, _ints(chunk.get("sizes")), dtype)))
    try:
        return place(parts, shape)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is incomplete: {error}") from None


def _ints(size: Any) -> Shape:
    if isinstance(size, Inert):
        (size,) = size.args
    return tuple(int(length) for length in size)
