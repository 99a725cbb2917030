"""lm-evaluation-harness asks a running server: its log-likelihoods are the model's own.

It is found as the command `lm_eval`, which may come from an environment of its own; without it, these are skipped by
name: `pip install "lm-eval[api]"`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hybrid.serving.conftest import Served, make_generator, serve
from tests.toy import MODEL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("lm_eval") is None, reason="there is no command lm_eval"),
]
TASK = """\
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""
DOCUMENTS = [
    {"question": "def main(", "choices": ["self", "arguments):\n", "é"], "label": 1},
    {"question": "import", "choices": [" os", " everything there is"], "label": 0},
    {"question": "class R", "choices": ["eader:\n    pass", "x"], "label": 0},
]


@pytest.fixture
def ending() -> Iterator[Served]:
    """A server whose model ends documents, so that some of the tokens after a prompt are that."""
    model = make_generator(MODEL, max_length=2100)
    model.engine.end = model.tokenizer.eod
    with torch.inference_mode():
        model.engine.runner.weights.output.weight[model.tokenizer.eod] *= 4
    yield from serve(model)


def test_its_log_likelihoods_are_the_models(ending: Served, tmp_path: Path) -> None:
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "local_choices.yaml").write_text(TASK.replace("FILE", str(data)))
    arguments = f"model=toy,base_url={ending.url}/v1/completions,tokenizer_backend=remote,num_concurrent=1"
    command = ["lm_eval", "run", "--model", "local-completions", "--model_args", arguments, "--tasks", "local_choices"]
    options = ["--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "out").rglob("samples_local_choices_*.jsonl")
    samples: list[Any] = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(samples) == len(DOCUMENTS)
    for sample in samples:
        document = sample["doc"]
        for choice, (((found, greedy),),) in zip(document["choices"], zip(sample["resps"], strict=True), strict=True):
            own, best = _score(ending, document["question"], choice)
            # Read in the same pieces by the same model: only the sum is added up elsewhere.
            assert float(found) == pytest.approx(own, rel=1e-9)
            assert (greedy == "True") == best


def _score(served: Served, question: str, choice: str) -> tuple[float, bool]:
    """The log-likelihood of `choice` after `question`, and whether it is what greedy decoding gives."""
    before, ids = question.encode(), (question + choice).encode()
    text = served.model.generate(list(ids), max_tokens=0, logprobs=1, echo=True)
    tokens = text.tokens[len(before) :]
    return sum(token.logprob or 0 for token in tokens), all(token.logprob == token.top[0][1] for token in tokens)
