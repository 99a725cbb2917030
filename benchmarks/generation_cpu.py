"""Tokens a second of this project's engine and of transformers' `generate`, on CPU, on the same weights, in one run.

    python benchmarks/generation_cpu.py [--tokens 128] [--rounds 5]

The model has the widths of `tiny` and Mamba-2 layers alone, as transformers has them; weights are random.
Both are asked greedily for the same number of tokens after the same prompt, in turns; printed are medians and ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from hybrid.data.tokenizer import ByteTokenizer
from recipes import open_generator

PROMPT = list(b"def main(arguments):\n    ")


def their_model(folder: Path) -> transformers.Mamba2ForCausalLM:
    """Widths of `tiny`: hidden 128, 8 heads of 32, state 32, 2 groups; 4 layers."""
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=257, hidden_size=128, num_heads=8, head_dim=32, state_size=32, n_groups=2, num_hidden_layers=4,
        expand=2, chunk_size=128, bos_token_id=256, eos_token_id=256, pad_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    count = arguments.tokens
    with tempfile.TemporaryDirectory() as name:
        theirs = their_model(Path(name))
        with open_generator(name, tokenizer="byte", slots=8, max_length=1024) as model:

            def ours(batch: int) -> list[list[int]]:
                settings = {"temperature": 0, "max_tokens": count, "ignore_end": True}
                texts = model.generate_batch([PROMPT] * batch, **settings)
                return [[token.token for token in text.tokens] for text in texts]

            def transformers_generate(batch: int) -> list[list[int]]:
                given = torch.tensor([PROMPT] * batch)
                made = theirs.generate(
                    given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=count,
                    max_new_tokens=count, eos_token_id=None,
                )  # fmt: skip
                return made[:, len(PROMPT) :].tolist()

            print(
                f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"
            )
            for batch in (1, 8):
                same = ours(batch) == transformers_generate(batch)
                times: dict[str, list[float]] = {"ours": [], "transformers": []}
                for _ in range(arguments.rounds):
                    times["ours"].append(timed(lambda: ours(batch)))  # noqa: B023
                    times["transformers"].append(timed(lambda: transformers_generate(batch)))  # noqa: B023
                speed = {who: batch * count / statistics.median(each) for who, each in times.items()}
                ratio = speed["ours"] / speed["transformers"]
                print(
                    f"batch {batch}: ours {speed['ours']:,.0f} tokens/s, transformers {speed['transformers']:,.0f}, "
                    f"ratio {ratio:.1f}; same tokens: {same}"
                )


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
