"""nemo-run: recipes on their way through it, and overrides against its own parser where that is right."""

from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from recipes import apply, hybrid_8b, registry, resolve, settings, tiny, to_nemo_run, typed

nemo_run = pytest.importorskip("nemo_run")
cli_parser = pytest.importorskip("nemo_run.cli.cli_parser")


@pytest.mark.parametrize("reference", [*registry.entries(), *(f"finetune({name})" for name in registry.entries())])
def test_a_recipe_survives_the_way_to_the_job(reference: str) -> None:
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    task = to_nemo_run(resolve(reference))
    assert isinstance(task, nemo_run.Partial)
    serializer = ZlibJSONSerializer()
    back = serializer.deserialize(serializer.serialize(task))
    assert back == task
    assert settings(back) == settings(resolve(reference))


def test_an_experiment_takes_a_recipe(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path))
    with nemo_run.Experiment("trial", base_dir=str(tmp_path)) as experiment:
        experiment.add(to_nemo_run(tiny()), executor=nemo_run.LocalExecutor(), name="tiny")
        assert len(experiment.jobs) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.hidden_size=2048", "trainer.global_batch_size*=2", "name=other"],
        ["optimizer.lr=1e-4", "optimizer.lr*=0.5", "trainer.seed+=5", "trainer.seed-=2"],
        ["model.activation=swiglu", "model.tie_embeddings=true", "parallel.sequence=0"],
        ["data.split=[0.5, 0.25, 0.25]", "data.tokenizer='a b'", "data.source=mock"],
        ["model.vocab_size=1_000", "model.rotary_percent=0.5", "model.hidden_size=-3"],
    ],
)
def test_overrides_mean_what_they_mean_to_nemo_run(arguments: list[str]) -> None:
    theirs = cli_parser.parse_cli_args(to_nemo_run(hybrid_8b()), arguments)
    assert to_nemo_run(apply(hybrid_8b(), arguments)) == theirs


def spellings(value: object) -> list[str]:
    """Ways to write a value on a command line."""
    return [repr(value), f" {value!r} "] if not isinstance(value, str) else [value, repr(value)]


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
# Words that are no number, no truth value, no None and no quoted text.
WORDS = st.from_regex(r"[A-Za-z_][A-Za-z_*/|-]{0,8}", fullmatch=True).filter(
    lambda word: word.lower() not in ("none", "null")
)
TYPED = (
    st.tuples(st.just(int), st.integers())
    | st.tuples(st.just(float), st.floats(allow_nan=False, allow_infinity=False))
    | st.tuples(st.just(bool), st.booleans())
    | st.tuples(st.just(str), WORDS)
    | st.tuples(st.just(Optional[int]), st.none() | st.integers())  # noqa: UP045  (nemo-run cannot read int | None)
    | st.tuples(st.just(Literal["cosine", "wsd"]), st.sampled_from(["cosine", "wsd"]))
    | st.tuples(st.just(list[int]), st.lists(st.integers(), max_size=4))
    | st.tuples(st.just(list[float]), st.lists(NUMBERS.map(float), max_size=4))
    | st.tuples(st.just(list[str]), st.lists(WORDS, max_size=4))
    | st.tuples(st.just(dict[str, int]), st.dictionaries(WORDS, st.integers(), max_size=3))
)


@examples(max_examples=200, deadline=None)
@given(TYPED, st.data())
def test_values_are_read_as_nemo_run_reads_them(typed_value: tuple, data: st.DataObject) -> None:
    annotation, value = typed_value
    text = data.draw(st.sampled_from(spellings(value))).strip()
    theirs = cli_parser.parse_value(text, annotation)
    ours = typed.parse(text, annotation)
    assert ours == theirs == value
    assert type(ours) is type(theirs)


def test_a_settled_recipe_is_what_is_sent() -> None:
    recipe = hybrid_8b()
    recipe.model.layer_pattern = "M-M*"
    assert to_nemo_run(recipe).model.num_layers is None
    assert settings(to_nemo_run(recipe)) == settings(recipe)
