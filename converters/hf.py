"""Hugging Face folders: config.json, safetensors (or pytorch_model.bin), tokenizer files; and state-spaces/mamba's."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from converters import aliases, hf_checks, naming, safefile, torchfile
from converters.checkpoint import Checkpoint, companions_of, complete
from converters.hf_families import FAMILIES, REFUSED, Family
from converters.streams import same
from converters.tensors import Tensor, cat, select, split
from converters.torchfile import Files, bytes_plan
from hybrid.config import ModelConfig
from hybrid.errors import CheckpointError, ConfigError, Problem, nearest

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000
"""Largest safetensors file, as transformers' save_pretrained has it."""

_PICKLE = "pytorch_model.bin"  # the only file that mamba-ssm loads
_WEIGHTS = ("model.safetensors", _PICKLE)


def find(path: Path) -> Path | None:
    """The folder with config.json and weights that `path` means, or None if it is no such folder."""
    if path.is_file() and (path.suffix == ".safetensors" or path.name in (CONFIG, _PICKLE)):
        path = path.parent
    return path if (path / CONFIG).is_file() and _weight_files(path)[1] else None


def read(path: Path, overrides: Mapping[str, Any], allow: Iterable[str] = ()) -> Checkpoint:
    """Open a folder of transformers or of state-spaces/mamba. Raises CheckpointError for damaged or missing files,
    ConfigError for a model that the layer pattern cannot express (why), or one that contradicts its tensors."""
    folder = find(path)
    assert folder is not None
    config = _config(folder)
    hf_checks.check_types(config)
    name = family_of(config, folder)
    family = FAMILIES[name]
    tensors = _tensors(folder, allow)
    known = {key: value for key, value in family.fields(config).items() if value is not None} | dict(overrides)
    logical, symbols, unknown = _canonical(tensors, family, known, config)
    model, assumed, missing, odd = complete(logical, symbols, known)
    mtp = [name for name in tensors if name.startswith("mtp.")]
    if "M" in model.pattern.layers and model.mamba_version != known.get("mamba_version", model.mamba_version):
        raise ConfigError(Problem(CONFIG, "and the tensors are of different Mamba versions"))
    return Checkpoint(
        path=folder,
        format="hf",
        model=model,
        tensors=logical,
        family=name,
        hf_config=config,
        companions=companions_of(folder),
        assumed=assumed,
        missing=missing,
        unknown=unknown | odd,
        left_out=[f"multi-token prediction (mtp.*, {len(mtp)} tensors)"] if mtp else [],
        unread_mtp=bool(mtp),
    )


def plan(source: Checkpoint, family: str | None = None) -> Files:
    """Plan the folder of `source` as a model of `family`, or of the first family that can hold it."""
    model = source.model
    name = choose(model, family)
    tensors: dict[str, Tensor] = {}
    for canonical, tensor in source.tensors.items():
        names = FAMILIES[name].names(canonical, model)
        tensors |= zip(names, _cut(canonical, tensor, len(names), model), strict=True)
    if model.tie_embeddings and name in ("nemotron_h", "state_spaces"):
        # transformers' NemotronH does not tie weights by itself, and mamba-ssm loads what it ties under both names, so
        # both are written; the config says they are one.
        tensors["lm_head.weight"] = source.tensors[naming.EMBEDDING]
    config = FAMILIES[name].config(model, _end_of_text(source.companions) | source.hf_config)
    if name != "state_spaces":
        config |= {"torch_dtype": _dtype(tensors), "dtype": _dtype(tensors)}
    files = {_PICKLE: torchfile.plan(tensors)} if name == "state_spaces" else _shards(tensors)
    files[CONFIG] = _json(config)
    for companion in source.companions:
        files[companion.name] = bytes_plan(companion.read_bytes())
    if name != "state_spaces":
        files.setdefault("generation_config.json", _json(_generation(config)))
    return files


def choose(model: ModelConfig, family: str | None = None) -> str:
    """The family to write a model as. Raises ConfigError with the reasons where there is none."""
    if family and family not in FAMILIES:
        raise ConfigError(Problem("--family", f"is '{family}', which is not one of {', '.join(FAMILIES)}"))
    candidates = [family] if family else [name for name in FAMILIES if name != "state_spaces"]
    general = ["it has multi-token prediction, which transformers does not run"] if model.pattern.mtp else []
    general += ["it has latent attention (+)"] if model.pattern.counts()["+"] else []
    general += ["its positions are learned"] if model.position_embedding == "learned" else []
    reasons = {name: general + FAMILIES[name].obstacles(model) for name in candidates}
    for name in candidates:
        if not reasons[name]:
            return name
    raise ConfigError(
        [
            Problem(f"{name}", "cannot hold this model: " + "; ".join(why), "leave the MTP layers out with --drop-mtp")
            if model.pattern.mtp and len(why) == 1
            else Problem(f"{name}", "cannot hold this model: " + "; ".join(why))
            for name, why in reasons.items()
        ]
    )


def family_of(config: Mapping[str, Any], folder: Path) -> str:
    """The family a config is of. Raises ConfigError, saying why, for one that the layer pattern cannot express."""
    kind = config.get("model_type")
    if kind is None and "n_layer" in config and "d_model" in config:
        return "state_spaces"
    if kind in REFUSED:
        raise ConfigError(Problem(str(folder), f"is a {kind} model, which cannot be converted: {REFUSED[kind]}"))
    if kind not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise ConfigError(Problem(str(folder), f"is of model_type '{kind}', which is not one of {names}"))
    return str(kind)


def _canonical(
    tensors: dict[str, Tensor], family: Family, known: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Logical tensors by canonical name, the layers' symbols, and the names on disk that are unknown."""
    pattern = known.get("layer_pattern")
    if not pattern:
        raise ConfigError(Problem(CONFIG, "does not say what layers the model has"))
    from hybrid import pattern as patterns

    layers = patterns.parse(pattern).layers
    if strange := sorted(set(layers) - set("M*-E")):
        raise ConfigError(
            Problem(
                "layer pattern", f"has {', '.join(strange)}; models of Hugging Face are read with M, *, - and E only"
            )
        )
    # What the names depend on is the layers alone, so every tensor that such a layer can have is asked for.
    biased = any(re.search(r"(q_proj|o_proj|gate_proj|up_proj|down_proj)\.bias$", name) for name in tensors)
    normed = any(re.search(r"norm(_f)?\.bias$", name) for name in tensors)
    experts = config.get("n_routed_experts") if "E" in layers else None
    if "E" in layers and not experts:
        raise ConfigError(
            Problem(
                "n_routed_experts", f"is {experts} in config.json, but there are MoE layers (E), which have experts"
            )
        )
    gated = family is FAMILIES["bamba"]
    model = ModelConfig(
        layer_pattern=layers,
        mamba_version=known.get("mamba_version", 2),
        add_linear_bias=biased,
        normalization="LayerNorm" if normed else "RMSNorm",
        activation="swiglu" if gated else "gelu",
        num_experts=experts,
        moe_shared_expert_size=1 if "E" in layers else None,
        moe_expert_bias=True,
        tie_embeddings=_tied(tensors, family, config),
    )
    head = known.get("attention_head_dim") or _head_width(tensors, config)
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in naming.parameters(model):
        targets = family.names(name, model)
        if not all(target in tensors for target in targets):
            continue
        used |= set(targets)
        result[name] = _joined(name, [tensors[target] for target in targets], head)
    if model.tie_embeddings:
        used.add("lm_head.weight")
    rest = [name for name in tensors if name not in used and aliases.is_weight(name) and not name.startswith("mtp.")]
    names = [target for name in naming.parameters(model) for target in family.names(name, model)]
    return result, {"decoder": layers}, {name: nearest(name, names) for name in rest}


def _tied(tensors: Mapping[str, Tensor], family: Family, config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embedding: a config may say so beside an output layer of its own.

    Published files of tied models hold both; where they differ, transformers' NemotronH computes with the output layer.
    """
    output = tensors.get("lm_head.weight")
    if output is None:
        return True
    if not (config.get("tie_word_embeddings") or config.get("tie_embeddings")):
        return False
    embedding = tensors.get(family.names(naming.EMBEDDING, ModelConfig(layer_pattern="M"))[0])
    return embedding is None or same(output, embedding)


def _joined(name: str, tensors: list[Tensor], head: int | None) -> Tensor:
    """The logical tensor of those on disk: one as it is, gate and up together, queries, keys and values by group."""
    if len(tensors) == 1:
        return tensors[0]
    if len(tensors) == 2:
        return cat(tensors, 0)
    query, key, value = tensors
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ConfigError(Problem(name, "cannot be put together: its queries, keys and values have different formats"))
    if not head or key.shape[0] % head or query.shape[0] % key.shape[0]:
        raise ConfigError(
            Problem(
                name, f"cannot be put together: {query.shape[0]} query rows, {key.shape[0]} key rows, heads of {head}"
            )
        )
    groups = key.shape[0] // head
    columns = [split(part, 0, [part.shape[0] // groups] * groups) for part in (query, key, value)]
    return cat([column[group] for group in range(groups) for column in columns], 0)


def _cut(name: str, tensor: Tensor, count: int, model: ModelConfig) -> list[Tensor]:
    """The tensors on disk of a logical one; undoes `_joined`."""
    if count == 1:
        return [tensor]
    if count == 2:
        return split(tensor, 0, [tensor.shape[0] // 2] * 2)
    groups, head = model.query_groups, model.head_dim
    queries = model.num_attention_heads // groups * head
    parts = split(tensor, 0, [queries, head, head] * groups)
    return [cat(parts[offset::3], 0) for offset in range(3)]


def _tensors(folder: Path, allow: Iterable[str]) -> dict[str, Tensor]:
    """All tensors of the folder, under the prefix that files have on disk, with experts apart."""
    result: dict[str, Tensor] = {}
    for stored, tensor in _stored(folder, allow).items():
        # transformers 5 calls NemotronH's stack `model.` in memory and may save it so.
        name = re.sub(r"^model\.(?=embeddings\.|norm_f\.|layers\.\d+\.(mixer|norm)\.)", "backbone.", stored)
        found = {name: tensor}
        if re.search(r"\.experts\.(up|down)_proj$", name):
            stem, projection = name.rsplit(".", 1)
            found = {f"{stem}.{j}.{projection}.weight": select(tensor, j) for j in range(tensor.shape[0])}
        if twice := sorted(found.keys() & result.keys()):
            raise CheckpointError(f"{folder}: {stored} is a second name of {twice[0]}, which is there, too")
        result |= found
    return result


def _stored(folder: Path, allow: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of the files by the names they have there, each from the file that an index names for it."""
    index, files = _weight_files(folder)
    result: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        found = safefile.load(path) if path.suffix == ".safetensors" else _pickled(path, allow)
        if lacking := sorted(name for name, file in index.items() if file == path.name and name not in found):
            raise CheckpointError(f"{path} lacks {lacking[0]}, which the index says lies in it")
        for name, tensor in found.items():
            if index.get(name, path.name) != path.name:
                continue
            if name in result:
                raise CheckpointError(f"{origin[name]} and {path} both hold {name}, and no index says which one counts")
            result[name], origin[name] = tensor, path
    return result


def _pickled(path: Path, allow: Iterable[str]) -> dict[str, Tensor]:
    content = torchfile.load(path, allow)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _weight_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """What an index says, file by tensor, and the files that hold the weights: those it names, or those there are."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                where = json.loads(index.read_text())["weight_map"]
                names = sorted(set(where.values()))
                outside = [entry for entry in names if Path(entry).name != entry]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CheckpointError(f"{index} is damaged: it does not name a file for each tensor") from None
            if outside:
                raise CheckpointError(f"{index} names files outside of its folder")
            return where, [folder / entry for entry in names]
        if (folder / name).is_file():
            return {}, [folder / name]
    return {}, sorted(folder.glob("*.safetensors"))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no settings")
    return config


def _head_width(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
    if width := config.get("attention_head_dim") or config.get("head_dim"):
        return int(width)
    heads = config.get("num_attention_heads")
    query = next((tensor for name, tensor in tensors.items() if name.endswith("q_proj.weight")), None)
    return query.shape[0] // heads if heads and query else None


def _shards(tensors: dict[str, Tensor]) -> Files:
    """safetensors files of at most SHARD_BYTES, with an index if there are several."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": safefile.plan(groups[0])}
    names = [f"model-{index:05d}-of-{len(groups):05d}.safetensors" for index in range(1, len(groups) + 1)]
    where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    total = sum(tensor.nbytes for tensor in tensors.values())
    files = {file: safefile.plan(group) for file, group in zip(names, groups, strict=True)}
    files["model.safetensors.index.json"] = _json({"metadata": {"total_size": total}, "weight_map": where})
    return files


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    return {"_from_model_config": True, **ids}


def _end_of_text(companions: Iterable[Path]) -> dict[str, int]:
    """The `eos_token_id` that the tokenizer's files beside a model name; nothing if they name none.

    Without it transformers takes its family's own, and a model that ends its texts is not heard.
    """
    files = {path.name: path for path in companions}
    try:
        named = json.loads(files["tokenizer_config.json"].read_text())["eos_token"]
        tokenizer = json.loads(files["tokenizer.json"].read_text())
        end = named["content"] if isinstance(named, dict) else named
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        vocabulary = tokenizer["model"]["vocab"]
        ids = added if end in added or not isinstance(vocabulary, dict) else vocabulary
        return {"eos_token_id": ids[end]}
    except (KeyError, TypeError, ValueError):
        return {}


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    """The number format of most bytes."""
    bytes_of: dict[str, int] = {}
    for tensor in tensors.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def _json(value: Any) -> "torchfile.Plan":
    return bytes_plan((json.dumps(value, indent=2) + "\n").encode())
