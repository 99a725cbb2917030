"""Pickles read without running anything, and written again.

Unpickling calls what the pickle names, so a checkpoint can run code when it is loaded. Here every global that a pickle
names must be on a list, and even a listed one is not imported: it becomes an `Inert` stand-in that records how it was
called. The exceptions are a few types of the standard library that only hold data, and torch's tensors, which become
`converters.tensors.Tensor`.
"""

import argparse
import collections
import io
import pickle
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from converters.tensors import ITEM_SIZES, Flat, Tensor, contiguous_strides, reinterpret, stored
from hybrid.errors import CheckpointError

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
"""The number format that each of torch's storage classes stands for."""

# Types of the standard library that hold data, do nothing when they are made, and cannot be changed themselves (a
# pickle can set attributes of whatever it names).
_DATA: dict[str, Any] = {
    "types.SimpleNamespace": types.SimpleNamespace,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.deque": collections.deque,
    "collections.defaultdict": collections.defaultdict,
    "io.BytesIO": io.BytesIO,
    "_io.BytesIO": io.BytesIO,
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (int, float, complex, bool, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice, range)
    },
}

# What Megatron, torch and NumPy leave in checkpoints beside tensors: settings, random states, fp8 recipes.
_KNOWN = {
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath")),
    "signal.Signals",
    "_codecs.encode",
    "datetime.timedelta",
    "torch.Size",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.device",
    "torch.Generator",
    "torch._C.Generator",
    "torch._C._nn.gelu",
    "torch.nn.functional.gelu",
    "torch.nn.functional.silu",
    "torch.nn.functional.relu",
    "torch.serialization._get_layout",
    "torch.storage._load_from_bytes",
    "torch.nn.init.xavier_uniform_",
    *(f"torch.{name}" for name in ITEM_SIZES),
    *(f"torch.{name}" for name in ("float", "double", "half", "long", "int", "short", "strided", "contiguous_format")),
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.planner.SavePlan",
    *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("_reconstruct", "scalar")),
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "uint32", "int64", "float64", "float32", "bool_")),
    "numpy.dtypes.UInt32DType",
    *(f"megatron.core.enums.{name}" for name in ("ModelType", "Fp8Recipe", "Fp4Recipe")),
    *(
        f"megatron.core.transformer.enums.{name}"
        for name in (
            "AttnBackend", "AttnMaskType", "AttnType", "LayerType", "ModelType",
            "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope",
        )
    ),
    *(f"megatron.core.rerun_state_machine.{name}" for name in ("RerunDiagnostic", "RerunMode", "RerunState")),
    "megatron.core.optimizer.OptimizerConfig",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.optimizer.optimizer_config.ParamKey",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
    "megatron.core.transformer.pipeline_parallel_layer_layout.PipelineParallelLayerLayout",
    "megatron.core.extensions.transformer_engine.TEDelayedScaling",
    *(f"megatron.{module}.ModelType" for module in ("model.enums", "legacy.model.enums", "enums")),
    *(
        f"transformer_engine.common.recipe.{name}"
        for name in (
            "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling",
            "Format", "_FormatHelper", "MMParams", "QParams",
        )
    ),
}  # fmt: skip


class ForeignPickle(CheckpointError):
    """A pickle names something that is not on the list."""


class Inert:
    """Stands for an object of a class that is not imported: what it was made from, and nothing it could do."""

    module = name = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any) -> "Inert":
        """Called for an object that a pickle makes, in either of the two ways it can make one."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *_: Any):
        """Nothing to do: `__new__` has kept the arguments."""

    # What the opcodes BUILD, APPEND(S) and SETITEM(S) call.
    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """An item of a list."""
        self.items.append(item)

    def extend(self, items: Iterable[Any]) -> None:
        """Items of a list."""
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name} {self.args}>"

    def get(self, key: str, default: Any = None) -> Any:
        """A field of an object that was stored as a dict of fields."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True)
class Global:
    """Something a written pickle names."""

    module: str
    name: str

    def __call__(self) -> None:
        raise AssertionError("only a name")


@dataclass(frozen=True)
class StorageName:
    """A storage that a written pickle refers to: entry `key` of the file, `count` elements."""

    kind: str
    key: str
    count: int


def kept_names(allow: Iterable[str] = ()) -> frozenset[str]:
    """The globals that are read: the known ones and those that the user allows."""
    return frozenset(_KNOWN) | frozenset(allow)


def load(
    data: bytes, place: str, storage: Callable[[str, str, int], Tensor] | None = None, allow: Iterable[str] = ()
) -> Any:
    """Return what the pickle `data` holds.

    `storage(key, dtype, count)` gives the flat tensor of a storage. Raises ForeignPickle, naming everything in `place`
    that is not on the list, before anything of it is used; CheckpointError if it is no pickle.
    """
    names = kept_names(allow)
    foreign: list[str] = []
    classes: dict[str, type] = {}
    # A class of its own for every pickle, since this one can be changed.
    namespace = type("Namespace", (argparse.Namespace,), {})

    def stand_in(module: str, name: str) -> type:
        full = f"{module}.{name}"
        if full not in classes:
            classes[full] = type("Inert", (Inert,), {"module": module, "name": name})
        return classes[full]

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full == "argparse.Namespace":
                return namespace
            if full in _DATA:
                return _DATA[full]
            if full in _REBUILDERS:
                return _REBUILDERS[full]
            if module in ("torch", "torch.storage") and name in STORAGES:
                return STORAGES[name]
            if full not in names:
                foreign.append(full)
            return stand_in(module, name)

        def persistent_load(self, pid: Any) -> Any:
            if storage is None or not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
                raise CheckpointError(f"{place}: a pickle refers to something outside of it")
            _, kind, key, _, count = pid
            return storage(str(key), kind, int(count))

    try:
        result = Unpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:
        if foreign:
            raise _refused(place, foreign) from None
        raise CheckpointError(f"{place} is damaged: its pickle cannot be read ({error})") from None
    if foreign:
        raise _refused(place, foreign)
    return result


def _refused(place: str, foreign: list[str]) -> ForeignPickle:
    names = ", ".join(sorted(set(foreign)))
    return ForeignPickle(
        f"{place} names {names}, which no checkpoint needs and which could run code when it is loaded; "
        "nothing of it was run. To read the rest all the same, without running it: "
        + " ".join(f"--allow-pickle {name}" for name in sorted(set(foreign)))
    )


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """The tensor that torch._utils._rebuild_tensor_v2 would make."""
    shape, strides = _ints(size), _ints(stride)
    item = ITEM_SIZES[storage.dtype]
    reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and reach > storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.size} elements")
    if not storage.pieces or 0 in shape:
        return Tensor(shape, storage.dtype, ())
    (piece,) = storage.pieces
    assert piece.source is not None
    return stored(piece.source, piece.offset + offset * item, shape, storage.dtype, strides)


def _ints(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, Inert):
        (sizes,) = sizes.args
    return tuple(int(size) for size in sizes)


def _tensor_v3(
    storage: Tensor, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """The tensor that torch._utils._rebuild_tensor_v3 would make: of a number format without a storage of its own."""
    name = getattr(dtype, "name", "")
    if name not in ITEM_SIZES:
        raise ValueError(f"the number format {name or dtype} is not read")
    return _tensor(reinterpret(storage, name), offset, size, stride)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _subclass(rebuild: Any, kind: Any, args: Any, *_: Any) -> Any:
    """What torch._tensor._rebuild_from_type_v2 would make: a tensor with attributes, which are left out."""
    assert isinstance(rebuild, _Rebuilder)
    return rebuild(*args)


class _Rebuilder:
    """A function of torch that makes tensors, which a pickle can call but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


_REBUILDERS = {
    "torch._utils._rebuild_tensor": _Rebuilder(_tensor),
    "torch._utils._rebuild_tensor_v2": _Rebuilder(_tensor),
    "torch._utils._rebuild_tensor_v3": _Rebuilder(_tensor_v3),
    "torch._utils._rebuild_parameter": _Rebuilder(_parameter),
    "torch._utils._rebuild_parameter_with_state": _Rebuilder(_parameter),
    "torch._tensor._rebuild_from_type_v2": _Rebuilder(_subclass),
}


_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # the one in C cannot be taught to write names


class _Pickler(_PythonPickler):
    """Writes tensors as torch does and `Global`s as names, importing nothing."""

    def __init__(self, file: io.BytesIO, storage: Callable[[Tensor | Flat], StorageName] | None):
        super().__init__(file, protocol=2)
        self._storage = storage
        self._names: dict[Any, Global] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, StorageName):
            module = "torch.storage" if obj.kind == "UntypedStorage" else "torch"
            return ("storage", Global(module, obj.kind), obj.key, "cpu", obj.count)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, argparse.Namespace):
            return Global("argparse", "Namespace"), (), dict(vars(obj))
        if isinstance(obj, Inert):
            # Enums and paths, which are made by a call with their values; nothing else is kept for writing.
            return Global(obj.module, obj.name), obj.args
        if isinstance(obj, Tensor | Flat):
            assert self._storage is not None
            storage, strides, hooks = self._storage(obj), contiguous_strides(obj.shape), collections.OrderedDict()
            if storage.kind == "UntypedStorage":
                dtype = self._names.setdefault(obj.dtype, Global("torch", obj.dtype))
                rebuild = Global("torch._utils", "_rebuild_tensor_v3")
                return rebuild, (storage, 0, obj.shape, strides, False, hooks, dtype)
            return Global("torch._utils", "_rebuild_tensor_v2"), (storage, 0, obj.shape, strides, False, hooks)
        return NotImplemented

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, type) and issubclass(obj, Inert):  # a bare name such as torch.bfloat16
            obj = self._names.setdefault(obj, Global(obj.module, obj.name))
        super().save(obj, save_persistent_id)

    def _save_name(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode("ascii"))
        self.memoize(obj)

    dispatch: ClassVar[dict[type, Any]] = {**_PythonPickler.dispatch, Global: _save_name}


def dump(value: Any, storage: Callable[[Tensor | Flat], StorageName] | None = None) -> bytes:
    """Return the pickle of plain data with `Tensor`s and `Global`s in it; `storage` names the storage of a tensor."""
    file = io.BytesIO()
    _Pickler(file, storage).dump(value)
    return file.getvalue()
