"""Hugging Face models, there and back: against transformers' own classes, loaded strictly, weights and logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converters import convert, hf, naming, summary
from hybrid.data import bytelevel
from hybrid.errors import CheckpointError, ConfigError

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor]]]
VOCABULARY = 130
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32}
MAMBA = {"chunk_size": 16, "n_groups": 2}
NEMOTRON = {
    **COMMON, **MAMBA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "ssm_state_size": 8, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # name: class, config class, config, layer pattern
    "nemotron_h": (
        "NemotronHForCausalLM", "NemotronHConfig",
        {**NEMOTRON, "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]},
        "M-*M-",
    ),
    "nemotron_h moe": (
        "NemotronHForCausalLM", "NemotronHConfig",
        {**NEMOTRON, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}, "ME*E",
    ),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {**COMMON, **MAMBA, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "state_size": 16}, "MMM",
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**COMMON, "num_hidden_layers": 3, "state_size": 8}, "MMM"),
    "bamba": (
        "BambaForCausalLM", "BambaConfig",
        {
            **COMMON, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8,
            "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16,
        },
        "M-*-M-*-",
    ),
}  # fmt: skip
TOKENS = torch.randint(0, VOCABULARY, (2, 37), generator=torch.Generator().manual_seed(1))


def hf_model(name: str, **changes: Any) -> Any:
    """A model of transformers with random weights that make every part of it count."""
    model_class, config_class, config, _ = MODELS[name]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**config, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict(keep_vars=True).items():
            noise = torch.randn(value.shape, generator=generator)
            if key.endswith("A_log"):
                value.copy_(torch.log(1 + noise.abs() * 3))
            elif "norm" in key:
                value.copy_(1 + 0.3 * noise)
            elif key.endswith(("dt_bias", ".D", "dt_proj.bias")):
                value.copy_(noise)
            else:
                value.copy_(0.2 * noise)
    return unclamped(model)


def unclamped(model: Any) -> Any:
    """transformers clamps NemotronH's time step to at least time_step_min (its issue 48989), the model does not."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model.float().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load_strictly(name: str, folder: Path) -> Any:
    """The model that transformers makes of a folder, which must have every tensor and no other."""
    model_class = getattr(transformers, MODELS[name][0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["megatron", "torch_dist"])
def test_from_transformers_and_back(tmp_path: Path, name: str, way: str) -> None:
    model = hf_model(name)
    model.save_pretrained(tmp_path / "a")
    opened = convert.open_checkpoint(tmp_path / "a")
    assert opened.model.layer_pattern == MODELS[name][3]
    assert not (opened.missing or opened.unknown or opened.assumed)
    layout = {"tensor": 1 if name == "bamba" else 2, "pipeline": 2} if way == "megatron" else {}
    convert.convert(opened, tmp_path / "b", way, **layout)
    convert.convert(tmp_path / "b", tmp_path / "c", "hf")
    back = load_strictly(name, tmp_path / "c")
    before = model.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in back.state_dict().items())
    # The same weights in the same class: only the padding of the vocabulary and the settings could tell them apart.
    assert torch.equal(logits(back), logits(model))


def test_config_of_nemotron_h_is_read_by_old_and_new_code(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["hybrid_override_pattern"] == "M-M*-"
    assert config["layers_block_type"] == ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"]
    assert config["head_dim"] == config["attention_head_dim"] == 8
    assert config["time_step_min"] == 0.0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "a").layers_block_type == config["layers_block_type"]


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mixer.D", "backbone.layers.0.mixer.D"],
)
def test_both_prefixes_of_nemotron_h(tmp_path: Path, name: str) -> None:
    hf_model("nemotron_h moe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    prefix = name.split(".")[0]
    tensors = {key.replace("backbone.", f"{prefix}."): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert name in tensors
    assert not convert.open_checkpoint(tmp_path).missing


def test_experts_stacked_in_memory_and_apart_on_disk(tmp_path: Path) -> None:
    model = hf_model("nemotron_h moe")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    prefix = "backbone.layers.1.mixer.experts"
    apart = {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    for projection in ("up_proj", "down_proj"):
        stacked = torch.stack([apart[f"{prefix}.{expert}.{projection}.weight"] for expert in range(4)])
        tensors[f"{prefix}.{projection}"] = stacked
    save_file(tensors, path)
    found = dict(convert.stream(tmp_path))
    assert torch.equal(found["decoder.layers.1.mlp.experts.linear_fc1.weight2"], apart[f"{prefix}.2.up_proj.weight"])


@pytest.mark.parametrize("version", [1, 2])
def test_state_spaces_layout(saved: Saved, tmp_path: Path, version: int) -> None:
    source, weights = saved("mamba1" if version == 1 else "mamba2", tie_embeddings=True)
    convert.convert(source, tmp_path / "a", "hf", family="state_spaces")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["ssm_cfg"]["layer"] == f"Mamba{version}" and config["n_layer"] == 4 and "model_type" not in config
    # As published: a config of few words.
    (tmp_path / "b").mkdir()
    (tmp_path / "b/pytorch_model.bin").symlink_to(tmp_path / "a/pytorch_model.bin")
    few = {"d_model": 32, "n_layer": 4, "vocab_size": 250, "rms_norm": True, "tie_embeddings": True}
    ssm = {} if version == 1 else {"layer": "Mamba2", "d_state": 4, "ngroups": 8}
    (tmp_path / "b/config.json").write_text(json.dumps(few | {"ssm_cfg": ssm, "pad_vocab_size_multiple": 8}))
    opened = convert.open_checkpoint(tmp_path / "b")
    assert opened.family == "state_spaces" and not (opened.missing or opened.unknown)
    back = dict(convert.stream(opened))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name][:250], weights[name][:250]) for name in weights)


def state_of_mamba_ssm(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state_dict of mamba-ssm's MambaLMHeadModel(MambaConfig(**config)), as of its 2.3.2."""
    width, ssm = config["d_model"], config["ssm_cfg"]
    inner, state, kernel = ssm["expand"] * width, ssm["d_state"], ssm["d_conv"]
    multiple = config["pad_vocab_size_multiple"]
    rows = -(-config["vocab_size"] // multiple) * multiple
    if ssm["layer"] == "Mamba1":
        rank = ssm["dt_rank"]
        mixer = {
            "A_log": (inner, state), "D": (inner,), "in_proj.weight": (2 * inner, width),
            "conv1d.weight": (inner, 1, kernel), "conv1d.bias": (inner,), "x_proj.weight": (rank + 2 * state, inner),
            "dt_proj.weight": (inner, rank), "dt_proj.bias": (inner,), "out_proj.weight": (width, inner),
        }  # fmt: skip
    else:
        heads, both = inner // ssm["headdim"], 2 * ssm["ngroups"] * state
        mixer = {
            "A_log": (heads,), "D": (heads,), "dt_bias": (heads,), "in_proj.weight": (2 * inner + both + heads, width),
            "conv1d.weight": (inner + both, 1, kernel), "conv1d.bias": (inner + both,), "norm.weight": (inner,),
            "out_proj.weight": (width, inner),
        }  # fmt: skip
    norm = {"weight": (width,)} | ({} if config["rms_norm"] else {"bias": (width,)})
    layer = {f"mixer.{name}": shape for name, shape in mixer.items()}
    layer |= {f"norm.{name}": shape for name, shape in norm.items()}
    layers = range(config["n_layer"])
    return {
        "backbone.embedding.weight": (rows, width),
        **{f"backbone.layers.{index}.{name}": shape for index in layers for name, shape in layer.items()},
        **{f"backbone.norm_f.{name}": shape for name, shape in norm.items()},
        "lm_head.weight": (rows, width),  # tied or not
    }


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@pytest.mark.parametrize(
    "changes", [{"tie_embeddings": True}, {"normalization": "LayerNorm"}], ids=["tied", "layernorm"]
)
def test_mamba_ssm_loads_what_is_written_for_it(
    saved: Saved, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """`MambaLMHeadModel.from_pretrained` does torch.load of pytorch_model.bin, and load_state_dict, strictly."""
    source, weights = saved(kind, **changes)
    convert.convert(source, tmp_path / "a", "hf", family="state_spaces", verify=True)
    config = json.loads((tmp_path / "a/config.json").read_text())
    state = torch.load(tmp_path / "a/pytorch_model.bin", map_location=None)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == state_of_mamba_ssm(config)
    output = state["lm_head.weight"]
    assert torch.equal(output, weights[naming.EMBEDDING if config["tie_embeddings"] else naming.OUTPUT][:250])
    shared = output.data_ptr() == state["backbone.embedding.weight"].data_ptr()  # which a file holds once
    assert shared == config["tie_embeddings"]
    opened = convert.open_checkpoint(tmp_path / "a")
    assert opened.model.tie_embeddings == config["tie_embeddings"] and not (opened.missing or opened.unknown)


def test_large_models_are_cut_into_shards_with_an_index(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "a", "hf", verify=True)
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in files for t in load_file(tmp_path / "a" / f).values()
    )
    assert dict(convert.stream(tmp_path / "a")).keys() == weights.keys()
    load_strictly("nemotron_h", tmp_path / "a")


def test_a_tensor_counts_where_the_index_says_it_lies(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may hold a stale copy of what another one holds. Without an index nothing says which one is stale."""
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "a", "hf")
    path = tmp_path / "a/model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "backbone.layers.0.mixer.D"
    other = tmp_path / "a" / max(index["weight_map"].values())
    assert index["weight_map"][name] != other.name
    save_file({**load_file(other), name: torch.zeros(16)}, other)
    found = dict(convert.stream(tmp_path / "a"))
    assert torch.equal(found["decoder.layers.0.mixer.D"], weights["decoder.layers.0.mixer.D"])

    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "more": other.name}}))
    with pytest.raises(CheckpointError, match=rf"{other.name} lacks more, which the index says lies in it"):
        convert.open_checkpoint(tmp_path / "a")
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{other.name} both hold {name}, and no index says which one counts"):
        convert.open_checkpoint(tmp_path / "a")


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    hf_model("nemotron_h").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    prefix = "model." if "model.layers.0.mixer.D" in tensors else "backbone."
    other = "backbone." if prefix == "model." else "model."
    save_file({**tensors, f"{other}layers.0.mixer.D": torch.zeros(6)}, path)
    with pytest.raises(CheckpointError, match=r"layers.0.mixer.D is a second name of backbone.layers.0.mixer.D"):
        convert.open_checkpoint(tmp_path)


def test_tied_embeddings(saved: Saved, tmp_path: Path) -> None:
    """transformers' NemotronH ties nothing, so both are written; they are one again on the way back."""
    source, weights = saved("tied")
    convert.convert(source, tmp_path / "a", "hf", family="nemotron_h")
    model = load_strictly("nemotron_h", tmp_path / "a")
    assert torch.equal(model.lm_head.weight, weights[naming.EMBEDDING].float()[:250])
    assert convert.open_checkpoint(tmp_path / "a").model.tie_embeddings


def test_an_output_layer_that_is_not_the_embedding_is_kept_whatever_the_config_says(
    saved: Saved, tmp_path: Path
) -> None:
    source, weights = saved("hybrid")
    convert.convert(source, tmp_path / "a", "hf")
    change_config(tmp_path / "a", tie_word_embeddings=True)
    opened = convert.open_checkpoint(tmp_path / "a")
    assert not (opened.model.tie_embeddings or opened.unknown)
    assert torch.equal(dict(convert.stream(opened))[naming.OUTPUT], weights[naming.OUTPUT][:250])


def test_multi_token_prediction_is_left_out_only_when_asked(saved: Saved, tmp_path: Path) -> None:
    """transformers passes over the MTP layers of a file, too; a conversion that loses weights says so."""
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    path = tmp_path / "a/model.safetensors"
    save_file(load_file(path) | {"mtp.layers.0.eh_proj.weight": torch.zeros(32, 64)}, path)
    opened = convert.open_checkpoint(tmp_path / "a")
    assert "left out       multi-token prediction (mtp.*, 1 tensors)" in summary.text(opened)
    with pytest.raises(ConfigError, match=r"which is not read from hf\nleave the MTP layers out with --drop-mtp"):
        convert.convert(opened, tmp_path / "b", "torch_dist")
    convert.convert(opened, tmp_path / "b", "torch_dist", drop_mtp=True)
    convert.as_torch_dist(opened, tmp_path / "cache")


def test_tokenizer_and_settings_of_generation_go_along(saved: Saved, tmp_path: Path) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/generation_config.json").write_text('{"temperature": 0.5}')
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"eos_token_id": 11}))
    convert.convert(tmp_path / "a", tmp_path / "b", "torch_dist")
    convert.convert(tmp_path / "b", tmp_path / "c", "megatron")
    convert.convert(tmp_path / "c", tmp_path / "d", "hf")
    assert (tmp_path / "d/tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "d/generation_config.json").read_text()) == {"temperature": 0.5}
    assert json.loads((tmp_path / "d/config.json").read_text())["eos_token_id"] == 11


@pytest.mark.parametrize("named", ["<end>", {"content": "<end>"}])
def test_the_tokenizer_says_which_token_ends_a_text_where_no_config_does(
    saved: Saved, tmp_path: Path, named: object
) -> None:
    convert.convert(saved("hybrid")[0], tmp_path / "a", "hf")
    (tmp_path / "a/generation_config.json").unlink()
    for name, content in bytelevel.byte_vocabulary("<end>").items():
        content |= {"eos_token": named} if name == "tokenizer_config.json" else {}
        (tmp_path / "a" / name).write_text(json.dumps(content))
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text())["eos_token_id"] == 256


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit: is \[0.0, 0.1\]; our Mamba layers do not limit"),
        ("bamba", {"time_step_limit": [0.01, float("inf")]}, r"time_step_limit: is \[0.01, inf\]"),
        ("nemotron_h", {"mamba_dt_limit": [0.0, 1.0]}, r"mamba_dt_limit: is \[0.0, 1.0\]"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act: is 'gelu'; the Mamba layers of our model have silu only"),
        ("bamba", {"hidden_act": "relu"}, "hidden_act: is 'relu'; the Mamba layers and gated MLPs of our model"),
        ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act: is 'gelu'"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act: is 'silu'; our config has gelu and squared_relu"),
        ("nemotron_h moe", {"norm_topk_prob": False}, "norm_topk_prob: is False; our router knows only True"),
        (
            "bamba",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters.rope_type: is 'yarn'",
        ),
        ("bamba", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type: is 'linear'"),
        ("bamba", {"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta: is 10000.5; our config has whole numbers"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias: is False; the convolutions of our Mamba layers always"),
        ("mamba2", {"use_bias": True}, "use_bias: is True; the projections of our Mamba layers have no bias"),
        ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias: is True"),
        ("bamba", {"attention_bias": True}, "attention_bias: is True and mlp_bias False; our model has biases in both"),
        ("nemotron_h moe", {"mlp_bias": True}, "mlp_bias: is True; experts of our model have no biases"),
        ("nemotron_h moe", {"moe_latent_size": 16}, "moe_latent_size: is 16; our experts take hidden states as wide"),
        ("nemotron_h", {"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon: is 1e-06; .* and ours always 1e-05"),
        ("mamba2", {"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon: is 1e-06; .* and ours always 1e-05"),
        ("bamba", {"rms_norm_eps": 1e-6}, r"rms_norm_eps: is 1e-06; .* and ours always 1e-05"),
        # Everything at once.
        ("mamba2", {"use_bias": True, "hidden_act": "relu"}, "hidden_act: .*\nuse_bias: "),
    ],
)
def test_a_setting_that_our_model_computes_otherwise(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    hf_model(name).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        convert.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mamba2", {"time_step_limit": None}),
        ("mamba2", {"time_step_limit": [0.0, {"__float__": "Infinity"}], "hidden_act": "swish"}),
        ("bamba", {"time_step_limit": [0, "inf"], "rms_norm_eps": 9.999999747378752e-06}),
        ("mamba", {"layer_norm_epsilon": 1e-6}),  # Mamba-1 has no gated norm
        ("bamba", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e6}),
    ],
)
def test_other_spellings_of_what_our_model_computes(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    hf_model(name).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    opened = convert.open_checkpoint(tmp_path)
    opened.require_complete()
    assert opened.model.rotary_base == int(changes.get("rope_theta", 10000))


@pytest.mark.parametrize("kind", sorted(hf.REFUSED))
def test_models_the_pattern_cannot_express(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"is a {kind} model, which cannot be converted: [a-z]"):
        convert.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "family", "reason"),
    [
        ("swiglu", {"add_linear_bias": False}, "nemotron_h", "its MLPs have no gate, these are SwiGLU"),
        ("hybrid", {"position_embedding": "rope"}, "nemotron_h", "has no position embedding, this one has 'rope'"),
        (
            "moe",
            {"moe_router_score": "softmax"},
            "nemotron_h",
            "its router scores with a sigmoid, this one with a softmax",
        ),
        ("hybrid", {}, "mamba2", "it has only 'M' layers, this model is 'M-M\\*-'"),
        ("mamba1", {}, "mamba2", "its layers are Mamba-2, these are Mamba-1"),
        ("swiglu", {}, "bamba", "its attention rotates half of each head"),
        ("layernorm", {}, None, "its norms are RMSNorm, these are LayerNorm"),
        ("hybrid", {"norm_epsilon": 1e-6}, "nemotron_h", "its gated norms add what the other norms add, these 1e-05"),
        ("mamba2", {"norm_epsilon": 1e-6}, "mamba2", "its gated norms add what the other norms add, these 1e-05"),
        ("mamba1", {"norm_epsilon": 1e-6}, "state_spaces", "its norms always add 1e-05, these 1e-06"),
        ("moe", {"add_linear_bias": True}, "nemotron_h", "its experts have no biases, these have"),
        ("mtp", {}, None, "multi-token prediction.*(\n.*)?--drop-mtp"),
    ],
)
def test_models_a_family_cannot_hold(
    make_model: Any, kind: str, changes: dict[str, Any], family: str | None, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        hf.choose(make_model(kind, **changes), family)
