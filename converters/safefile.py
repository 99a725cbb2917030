"""safetensors files: headers read without the data, and planned so that they can be streamed.

The format: 8 bytes (little endian) with the length of a JSON header, the header, the tensors one after the other
(https://github.com/huggingface/safetensors#format).
"""

import json
from pathlib import Path

from converters.tensors import Tensor, stored
from converters.torchfile import Part, Plan
from hybrid.errors import CheckpointError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, which still lie in it. Raises CheckpointError if it is damaged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} is truncated: it has {size} bytes, its header alone takes {length + 8}")
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError):
            raise CheckpointError(f"{path} is no safetensors file, or its header is damaged") from None
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: its header is damaged at the tensor {name}") from None
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has the number format {dtype}, which is not read")
        tensor = stored(path, 8 + length + start, shape, DTYPES[dtype])
        if tensor.nbytes != end - start:
            raise CheckpointError(f"{path}: {name} of shape {shape} has {end - start} bytes, not {tensor.nbytes}")
        if 8 + length + end > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, {name} reaches to byte {8 + length + end}"
            )
        tensors[name] = tensor
    return tensors


def plan(tensors: dict[str, Tensor]) -> Plan:
    """Plan a safetensors file of these tensors, in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _TAGS[tensor.dtype], "shape": shape, "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    parts = [Part(0, len(text).to_bytes(8, "little") + text)]
    place = 8 + len(text)
    for tensor in tensors.values():
        parts.append(Part(place, tensor))
        place += tensor.nbytes
    return Plan(place, parts)
