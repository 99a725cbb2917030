"""Parameter counts: published totals, sums over ranks, and the modules that megatron-core builds for a rank."""

import pytest

from hybrid.costs import parameters
from hybrid.costs.pipeline import stage_pattern


@pytest.mark.parametrize(
    ("name", "total", "non_embedding"),
    [
        # arXiv 2406.07887 and the 2024 example; 256,000 tokens, untied
        ("hybrid_8b", 8_654_517_248, 6_557_365_248),
        ("hybrid_800m", 907_127_680, 382_839_680),
        ("mamba2_8b", 8_236_999_680, 6_139_847_680),
        ("mamba_8b", 8_148_783_104, 6_051_631_104),
        ("mamba_8b_n16", 7_994_642_432, 5_897_490_432),
        ("transformer_8b", 8_540_135_424, 6_442_983_424),
    ],
)
def test_published_totals(settings_of, name, total, non_embedding):
    counted = parameters.whole(settings_of(name))
    assert (counted.total, counted.non_embedding) == (total, non_embedding)


@pytest.mark.parametrize(
    ("layers", "hidden_size", "total"),
    [(24, 768, 129_135_360), (48, 1024, 371_516_416), (64, 2560, 2_768_345_600)],
)
def test_published_mamba1_models(settings_of, layers, hidden_size, total):
    """state-spaces/mamba-130m, -370m and -2.8b: 50,280 tokens, padded to a multiple of 8, tied embeddings."""
    changes = {"model__mamba_state_dim": 16, "model__vocab_size": 50280, "model__vocab_size_multiple": 8}
    settings = settings_of("mamba_8b", model__num_layers=layers, model__hidden_size=hidden_size, **changes)
    settings.model.tie_embeddings = True
    assert parameters.whole(settings).total == total


def test_layers_of_the_8b_hybrid(settings_of):
    model = settings_of("hybrid_8b").model
    assert [parameters.layer(model, symbol) for symbol in "M*-"] == [109_640_064, 41_947_136, 134_221_824]


def test_pipeline_stages_add_up_to_the_model(settings_of):
    settings = settings_of("nemotron_h_56b", parallel__pipeline=8)
    pattern = stage_pattern(settings)
    stages = [parameters.rank(settings, pattern, stage) for stage in range(8)]
    assert sum(stage.total for stage in stages) == parameters.whole(settings).total
    assert [stage.embedding > 0 for stage in stages] == [True] + [False] * 7
    assert [stage.output > 0 for stage in stages] == [False] * 7 + [True]


def test_tied_embeddings_are_one_on_one_stage_and_two_on_two(settings_of):
    tied = settings_of("small", model__tie_embeddings=True)
    words = tied.model.padded_vocab_size * tied.model.hidden_size
    assert parameters.whole(settings_of("small")).total - parameters.whole(tied).total == words
    tied.parallel.pipeline = 2
    ranks = [parameters.rank(tied, stage_pattern(tied), stage).total for stage in (0, 1)]
    assert sum(ranks) == parameters.whole(tied).total + words


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to(settings_of):
    settings = settings_of("small_moe")
    assert parameters.active(settings_of("small")) == parameters.whole(settings_of("small")).total
    idle = parameters.whole(settings).total - parameters.active(settings)
    assert idle == 2 * (8 - 2) * (2 * 128 * 192)


def test_routed_experts_of_a_rank(settings_of):
    settings = settings_of("small_moe", parallel__expert=4, parallel__tensor=2, parallel__sequence=True)
    assert parameters.experts_of_rank(settings, stage_pattern(settings), 0) == 2 * 2 * (2 * 128 * 192) // 2
