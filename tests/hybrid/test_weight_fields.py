"""Which fields two models must share for the weights of one to be the other's."""

from dataclasses import fields, replace

from hybrid import weight_fields
from hybrid.config import ModelConfig
from hybrid.pattern import LAYER_KINDS

NAMES = {field.name for field in fields(ModelConfig)}


def test_every_layer_kind_has_its_fields_and_they_are_the_models() -> None:
    kinds = weight_fields._OF_KIND
    assert {kind[0] for kind in kinds} == set(LAYER_KINDS)
    assert {name for names in kinds.values() for name in names} <= NAMES


def test_only_what_the_layers_have_counts() -> None:
    model = ModelConfig(layer_pattern="MG", hidden_size=64)
    assert weight_fields.differing(model, replace(model, num_attention_heads=2, ffn_hidden_size=1, moe_top_k=1)) == {}
    other = replace(model, gdn_num_key_heads=4, mamba_state_dim=8)
    assert weight_fields.differing(model, other) == {"gdn_num_key_heads": (16, 4), "mamba_state_dim": (128, 8)}


def test_a_value_left_to_be_derived_is_what_it_stands_for() -> None:
    model = ModelConfig(layer_pattern="M-", hidden_size=64, activation="swiglu")
    assert weight_fields.differing(model, replace(model, ffn_hidden_size=256, mamba_num_heads=2)) == {}
    assert weight_fields.differing(model, replace(model, ffn_hidden_size=128)) == {"ffn_hidden_size": (256, 128)}


def test_layers_of_multi_token_prediction_count_too() -> None:
    model = ModelConfig(layer_pattern="MM/M-", hidden_size=64)
    assert weight_fields.differing(model, replace(model, ffn_hidden_size=8)) == {"ffn_hidden_size": (256, 8)}
