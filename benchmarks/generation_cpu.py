"""Tokens a second of this project's engine and of transformers' `generate`, on CPU, on the same weights, in one run.

    python benchmarks/generation_cpu.py [--tokens 128] [--rounds 5]

The model has the widths of `tiny` and Mamba-2 layers alone, as transformers has them; weights are random.
Both are asked greedily for the same number of tokens after the same prompt, in turns; printed are medians and ratios.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
    count, threads = arguments.tokens, torch.get_num_threads()
    torch.set_num_threads(1)  # none of OpenMP's threads stays with this one
    with tempfile.TemporaryDirectory() as name:
        theirs: Any = their_model(Path(name))

        def ours(batch: int) -> tuple[list[list[int]], float]:
            torch.set_num_threads(threads)
            with open_generator(name, tokenizer="byte", slots=8, max_length=1024) as model:
                model.generate(PROMPT, max_tokens=2)
                started = time.perf_counter()
                texts = model.generate_batch([PROMPT] * batch, temperature=0, max_tokens=count, ignore_end=True)
                took = time.perf_counter() - started
            torch.set_num_threads(1)
            return [[token.token for token in text.tokens] for text in texts], took

        def transformers_generate(batch: int) -> tuple[list[list[int]], float]:
            torch.set_num_threads(threads)
            given = torch.tensor([PROMPT] * batch)
            ask = {"attention_mask": torch.ones_like(given), "do_sample": False, "eos_token_id": None}
            theirs.generate(given, max_new_tokens=2, **ask)
            started = time.perf_counter()
            made = theirs.generate(given, min_new_tokens=count, max_new_tokens=count, **ask)
            return made[:, len(PROMPT) :].tolist(), time.perf_counter() - started

        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads")
        for batch in (1, 8):
            times: dict[str, list[float]] = {"ours": [], "transformers": []}
            made: dict[str, list[list[int]]] = {}
            for _ in range(arguments.rounds):
                made["ours"], took = ours(batch)
                times["ours"].append(took)
                # In a thread of its own: its OpenMP threads end with it, and are not in the way of the engine's.
                with ThreadPoolExecutor(1) as pool:
                    made["transformers"], took = pool.submit(transformers_generate, batch).result()
                times["transformers"].append(took)
            speed = {who: batch * count / statistics.median(each) for who, each in times.items()}
            same = made["ours"] == made["transformers"]
            print(
                f"batch {batch}: ours {speed['ours']:,.0f} tokens/s, transformers {speed['transformers']:,.0f}, "
                f"ratio {speed['ours'] / speed['transformers']:.1f}; same tokens: {same}"
            )


if __name__ == "__main__":
    main()
