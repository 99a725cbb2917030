"""Any layout into any layout and back: every bit of every weight."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters import convert, layout, megatron, naming
from converters.checkpoint import Checkpoint
from hybrid.config import ModelConfig
from hybrid.errors import ConfigError
from hybrid.pattern import Pattern

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]
KINDS = ("mamba2", "mamba1", "hybrid", "swiglu", "layernorm", "tied", "learned", "latent", "moe", "mtp")


def shard(name: str, weight: torch.Tensor, model: ModelConfig, rank: int, size: int) -> torch.Tensor:
    """What a tensor-parallel rank holds, by the rules as they are written down: the independent opinion."""
    d, heads, both = model.mamba_inner_size, model.mamba_heads, model.mamba_num_groups * model.mamba_state_dim
    gated = model.activation == "swiglu"

    def cut(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(size, dim)[rank]

    def of_parts(*lengths: int) -> torch.Tensor:
        return torch.cat([cut(part) for part in weight.split(lengths)])

    match name.split(".")[-3:]:
        case [*_, "in_proj", "weight"]:
            return of_parts(d, d, both, both, heads) if model.mamba_version == 2 else of_parts(d, d)
        case [*_, "conv1d", _] if model.mamba_version == 2:
            return of_parts(d, both, both)
        case [*_, "linear_fc1", ending] if ending.startswith(("weight", "bias")) and gated:
            return of_parts(weight.shape[0] // 2, weight.shape[0] // 2)
        case [*_, "x_proj" | "out_proj" | "linear_proj", "weight"]:
            return cut(weight, 1)
        case [*_, "linear_fc2", ending] if ending.startswith("weight"):
            return cut(weight, 1)
        case ["embedding", "word_embeddings", _] | [*_, "output_layer", _] | [*_, "eh_proj", _]:
            return cut(weight)
        case [*_, "mixer", "A_log" | "D" | "dt_bias"] | [*_, "dt_proj" | "conv1d", _] | ["mixer", "norm", _]:
            return cut(weight)
        case [*_, "linear_q_up_proj" | "linear_kv_up_proj", "weight"]:
            return cut(weight)
        case [*_, "linear_fc1" | "linear_qkv", ending] if ending.startswith(("weight", "bias")):
            return cut(weight)
    return weight


@st.composite
def layouts(draw: st.DrawFn, model: ModelConfig) -> dict[str, Any]:
    """A layout that the model can take, with even, uneven and virtual stages."""
    layers = model.pattern.layers
    pipeline = draw(st.sampled_from([1, 2, 3, 4]))
    sizes: dict[str, Any] = {"tensor": draw(st.sampled_from([1, 2, 4, 8])), "pipeline": pipeline}
    if model.num_experts:
        sizes["expert"] = draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()):
        segments = pipeline * draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
        if segments <= len(layers):
            cuts = sorted(draw(st.sets(st.integers(1, len(layers) - 1), min_size=segments - 1, max_size=segments - 1)))
            ends = [0, *cuts, len(layers)]
            main = "|".join(layers[a:b] for a, b in pairwise(ends))
            sizes["layer_pattern"] = main + f"/{model.pattern.mtp}" * model.pattern.mtp_depths
    return sizes


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return dict(convert.stream(path))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, saved: Saved, kind: str, data: st.DataObject) -> None:
    """legacy, one rank -> legacy, some layout -> torch_dist or legacy, another layout -> legacy, one rank."""
    folder = tmp_path_factory.mktemp(kind)
    if kind not in SOURCES:
        SOURCES[kind] = saved(kind)
    source, weights = SOURCES[kind]
    model = convert.open_checkpoint(source).model
    first = data.draw(layouts(model), label="first")
    second = data.draw(layouts(model), label="second")
    convert.convert(source, folder / "a", "megatron", **first)
    convert.convert(folder / "a", folder / "b", data.draw(st.sampled_from(["megatron", "torch_dist"])), **second)
    convert.convert(folder / "b", folder / "c", "megatron", verify=True)
    back = weights_of(folder / "c")
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(back[name], weight), name
    # What the ranks hold in between is what Megatron's rules say.
    opened = convert.open_checkpoint(folder / "a")
    assert opened.layout is not None and not opened.missing and not opened.unknown
    padded = weights_of(folder / "a")
    for rank in range(first["tensor"]):
        file = min((folder / "a").glob(f"iter_*/mp_rank_{rank:02d}*/*.pt"))
        content = torch.load(file, weights_only=False)
        first_stage = content.get("model", content.get("model0"))
        for name, tensor in first_stage.items():
            name = name.replace("conv1d_", "conv1d.")
            assert torch.equal(tensor, shard(name, padded[name], opened.model, rank, first["tensor"])), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


SOURCES: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}


@pytest.mark.parametrize("kind", KINDS)
def test_rank_state_is_what_the_files_hold(tmp_path: Path, saved: Saved, kind: str) -> None:
    source, _ = saved(kind)
    expert = 2 if kind == "moe" else 1
    convert.convert(source, tmp_path / "a", "megatron", tensor=2, pipeline=2, expert=expert)
    for t, p, e in [(0, 0, 0), (1, 1, expert - 1)]:
        name = f"mp_rank_{t:02d}_{p:03d}" + (f"_{e:03d}" if expert > 1 else "")
        content = torch.load(tmp_path / "a" / "iter_0000100" / name / "model_optim_rng.pt", weights_only=False)
        (state,) = convert.rank_state(tmp_path / "a", tensor=(t, 2), pipeline=(p, 2), expert=(e, expert))
        assert state.keys() == content["model"].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in content["model"].items())


REAL = {
    "hybrid 8B": ModelConfig(
        layer_pattern="M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-",
        hidden_size=4096,
        ffn_hidden_size=16384,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=256000,
    ),
    "Nemotron-H 56B": ModelConfig(
        layer_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-",
        hidden_size=8192,
        ffn_hidden_size=32768,
        num_attention_heads=64,
        num_query_groups=8,
        attention_head_dim=128,
        mamba_num_heads=256,
        mamba_head_dim=64,
        mamba_state_dim=256,
        vocab_size=131072,
        activation="squared_relu",
    ),
    "Nano 9B v2": ModelConfig(
        layer_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        hidden_size=4480,
        ffn_hidden_size=15680,
        num_attention_heads=40,
        num_query_groups=8,
        attention_head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=80,
        vocab_size=131072,
        activation="squared_relu",
    ),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("tensor", "pipeline"), [(8, 1), (4, 2), (2, 4), (8, 3)])
def test_real_shapes_are_cut_without_loss(tmp_path: Path, name: str, tensor: int, pipeline: int) -> None:
    """No data: every element of every logical tensor is in exactly the ranks it belongs to, and comes back in order."""
    from converters.tensors import stored

    model = REAL[name]
    target = layout.target(model, tensor, pipeline)
    assert len(target.pattern.segments) == pipeline
    params = naming.parameters(model)
    tensors = {n: stored(tmp_path / n, 0, param.shape, "bfloat16") for n, param in params.items()}
    held = layout.shards(tensors, model, target)
    total = sum(t.nbytes for t in tensors.values())
    replicated = sum(t.nbytes for n, t in tensors.items() if params[n].dim is None)
    assert sum(t.nbytes for rank in held.values() for t in rank.values()) == total + (tensor - 1) * replicated
    for key, param in params.items():
        (segment, local), *_ = layout.stage_of(key, target, tied=False)
        parts = [held[rank, segment, 0][local] for rank in range(tensor)]
        lengths = [length // tensor for _, length in param.parts]
        assert layout.merge(parts, param.dim, lengths) == tensors[key]


def test_stages_are_cut_by_size(make_model: Callable[..., ModelConfig]) -> None:
    model = make_model("hybrid", vocab_size=100_000)
    # The embedding and the output layer outweigh the layers, so the middle stage gets the most of those.
    assert [len(s) for s in layout.target(model, 1, 3).pattern.segments] == [1, 3, 1]


@pytest.mark.parametrize(
    ("kind", "sizes", "rule"),
    [
        ("hybrid", {"tensor": 3}, r"model.mamba_num_heads: is 16, but must be a multiple of --tensor-parallel \(3\)"),
        ("mamba2", {"tensor": 16}, r"mamba_num_groups: is 8, but must be a multiple of --tensor-parallel \(16\)"),
        ("hybrid", {"pipeline": 9}, r"is 9, but the model has 5 layers"),
        ("moe", {"expert": 3}, r"model.num_experts: is 4, but must be a multiple of --expert-parallel \(3\)"),
        ("hybrid", {"pipeline": 2, "layer_pattern": "M-|M*|-"}, r"has 3 segments, no multiple of"),
        ("hybrid", {"pipeline": 2, "layer_pattern": "M-M|*M"}, r"has other layers than the checkpoint"),
    ],
)
def test_a_layout_the_model_cannot_take(
    make_model: Callable[..., ModelConfig], kind: str, sizes: dict[str, Any], rule: str
) -> None:
    cut = sizes.pop("layer_pattern", None)
    with pytest.raises(ConfigError, match=rule):
        layout.target(make_model(kind), **sizes, cut=cut)


def test_key_value_heads_fewer_than_ranks(tmp_path: Path, saved: Saved) -> None:
    """2 groups over 8 ranks: the projection is cut into equal parts, which Megatron gathers."""
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "a", "megatron", tensor=8)
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    content = torch.load(tmp_path / "a/iter_0000100/mp_rank_03/model_optim_rng.pt", weights_only=False)
    assert torch.equal(content["model"][name], weights[name].chunk(8)[3])


def test_vocabulary_is_padded_by_megatrons_rule_and_cut_again(tmp_path: Path, saved: Saved) -> None:
    source, weights = saved("hybrid")  # 250 tokens, padded to a multiple of 8
    convert.convert(source, tmp_path / "a", "megatron", tensor=8)
    opened = convert.open_checkpoint(tmp_path / "a")
    assert opened.tensors[naming.EMBEDDING].shape[0] == 256 and opened.model.vocab_size == 250
    padded = weights_of(tmp_path / "a")[naming.EMBEDDING]
    assert torch.equal(padded[:250], weights[naming.EMBEDDING][:250])
    convert.convert(tmp_path / "a", tmp_path / "b", "hf", family="nemotron_h")
    assert convert.open_checkpoint(tmp_path / "b").tensors[naming.EMBEDDING].shape[0] == 250


def test_float32_parameters_stay_float32(tmp_path: Path, make_model: Any, make_weights: Any, make_legacy: Any) -> None:
    model = make_model("hybrid")
    weights = make_weights(model, dtype=torch.float32)
    source = make_legacy(tmp_path / "source", model, weights)
    convert.convert(source, tmp_path / "a", "torch_dist", dtype="bfloat16")
    for name, tensor in weights_of(tmp_path / "a").items():
        kept = name.endswith(("A_log", ".D", "dt_bias"))
        assert torch.equal(tensor, weights[name] if kept else weights[name].bfloat16()), name


def test_separate_norms(saved: Saved) -> None:
    """Names for a model without transformer-engine, in the order of its parameters."""
    opened: Checkpoint = convert.open_checkpoint(saved("hybrid")[0])
    names = list(convert.rank_state(opened, fused_norms=False)[0])
    assert "decoder.layers.0.norm.weight" in names and "decoder.layers.4.pre_mlp_layernorm.weight" in names
    assert not any("layer_norm_weight" in name for name in names)
    live = megatron.live_name("decoder.layers.0.mixer.conv1d.bias", opened.model)
    assert live == "decoder.layers.0.mixer.conv1d_bias"


def test_virtual_stages(tmp_path: Path, saved: Saved) -> None:
    source, _ = saved("hybrid")
    convert.convert(source, tmp_path / "a", "megatron", pipeline=2, layer_pattern="M|-|M|*-")
    content = torch.load(tmp_path / "a/iter_0000100/mp_rank_00_000/model_optim_rng.pt", weights_only=False)
    assert {"model0", "model1"} < content.keys()
    assert "decoder.layers.0.mixer.A_log" in content["model1"]  # the third segment
    opened = convert.open_checkpoint(tmp_path / "a")
    assert opened.layout is not None
    assert opened.layout.pattern == Pattern(("M", "-", "M", "*-")) and opened.layout.virtual == 2


def test_mtp_can_be_dropped(tmp_path: Path, saved: Saved) -> None:
    source, weights = saved("mtp")
    convert.convert(source, tmp_path / "a", "torch_dist", drop_mtp=True)
    opened = convert.open_checkpoint(tmp_path / "a")
    assert str(opened.model.pattern) == "M-M*" and not opened.missing
    assert opened.tensors.keys() == {name for name in weights if not name.startswith("mtp.")}


def test_the_source_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    source, _ = saved("hybrid")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.rglob("*")}
    convert.convert(source, tmp_path / "out", "megatron", tensor=2)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in source.rglob("*")} == before
    with pytest.raises(ConfigError, match="lies in the source"):
        convert.convert(source, source / "iter_0000100" / "out", "hf")


def test_a_run_is_left_alone(saved: Saved, tmp_path: Path) -> None:
    """The source is the run as a whole, be it named or one of its checkpoints; beside it is room."""
    run = tmp_path / "runs/tiny"
    convert.convert(saved("hybrid")[0], run / "checkpoints", "torch_dist")
    (run / "settings.json").write_text("{}")
    for source in (run, run / "checkpoints/iter_0000100"):
        with pytest.raises(ConfigError, match=r"runs/tiny/x: lies in the source .*runs/tiny, into which nothing is"):
            convert.convert(source, run / "x", "hf")
    convert.convert(run, tmp_path / "runs/tiny-hf", "hf")


def test_replace_keeps_layout_fields(make_model: Callable[..., ModelConfig]) -> None:
    """A pattern with '|' in a model says nothing about the layout it is converted to."""
    model = replace(make_model("hybrid"), layer_pattern="M-|M*-")
    assert layout.target(model).pattern.segments == ("M-M*-",)


def test_layers_of_attention_and_mlp_in_one_become_two(tmp_path: Path, saved: Saved) -> None:
    """What GPT models of Megatron call a layer, with GPT's name of the final norm."""
    source, weights = saved("hybrid", layer_pattern="*-*-", activation="gelu")
    path = source / "iter_0000100/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].hybrid_layer_pattern = None

    def gpt(name: str) -> str:
        parts = name.replace("final_norm", "final_layernorm").split(".")
        return ".".join([*parts[:2], str(int(parts[2]) // 2), *parts[3:]]) if parts[1] == "layers" else ".".join(parts)

    content["model"] = {gpt(name): tensor for name, tensor in content["model"].items()}
    torch.save(content, path)
    opened = convert.open_checkpoint(source)
    assert opened.model.layer_pattern == "*-*-"
    convert.convert(opened, tmp_path / "out", "megatron", tensor=2, pipeline=2)
    back = weights_of(tmp_path / "out")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", REAL)
def test_real_shapes_in_sparse_files(tmp_path: Path, name: str) -> None:
    """A legacy checkpoint of full size whose weights are holes: opened, and planned into every format."""
    import time

    from converters import arguments, torchfile
    from converters.tensors import zeros

    model = REAL[name]
    tensors = {key: zeros(param.shape, "bfloat16") for key, param in naming.parameters(model).items()}
    source = Checkpoint(tmp_path, "megatron", model, tensors, iteration=1)
    args = arguments.from_model(source, layout.target(model), 128)
    state = {megatron.live_name(key, model): tensor for key, tensor in tensors.items()}
    plan = torchfile.plan({"args": args, "iteration": 1, "model": state})
    path = tmp_path / "mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(plan.size)
        assert plan.seal is not None
        pieces = [(part.offset, part.content) for part in plan.parts if isinstance(part.content, bytes)]
        for offset, content in [*pieces, *plan.seal({part.offset: 0 for part in plan.parts})]:
            file.seek(offset)
            file.write(content)
    start = time.perf_counter()
    opened = convert.open_checkpoint(tmp_path)
    assert opened.model.pattern == model.pattern and not opened.missing and time.perf_counter() - start < 5
    nbytes = sum(tensor.nbytes for tensor in opened.tensors.values())
    replicated = sum(t.nbytes for n, t in opened.tensors.items() if naming.parameters(model)[n].dim is None)
    for to, sizes in (("megatron", {"tensor": 8, "pipeline": 3}), ("torch_dist", {"tensor": 8}), ("hf", {})):
        if to == "hf" and model.activation == "swiglu":
            continue
        files = convert.planned(opened, to, **sizes)
        total = sum(plan.size for plan in files.values())
        # What the layout repeats on every rank is needed; all else is less than a hundredth.
        needed = nbytes + (7 * replicated if to == "megatron" else 0)
        assert needed <= total < 1.01 * needed
