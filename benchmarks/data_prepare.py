"""`hybrid data prepare` against Megatron-LM's tools/preprocess_data.py: tokens/s with as many workers.

    git clone https://github.com/NVIDIA/Megatron-LM  # anywhere outside this repository
    python benchmarks/data_prepare.py --megatron Megatron-LM

The text is the Python sources around the running Python (standard library, its tests, installed packages), one file a
document, none twice; the tokenizers are trained on the standard library. Both programs get the same JSONL file and
must write the same bytes; they take turns.

The time is what each program says of itself, without Python's imports: Megatron-LM's tool from its last progress line
(reading, encoding and writing of .bin, not of .idx), ours from --json (everything from the start of the processes to
the finished files). Beside it stand the time of the whole commands, imports and all, and the time that their processes
had a core.
"""

import argparse
import base64
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from hybrid.config import DataConfig
from hybrid.data.corpus import find_files

LIBRARIES = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "megatron-core", "torch", "numpy")


def sources(megabytes: int) -> list[str]:
    paths = sysconfig.get_paths()
    files = sorted({*Path(paths["stdlib"]).rglob("*.py"), *Path(paths["purelib"]).rglob("*.py")})
    texts, size = [], 0
    # Every so many-th file, so that a small sample has something of everything.
    for path in (file for start in range(7) for file in files[start::7]):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        texts.append(text)
        size += len(text.encode())
        if size > megabytes << 20:
            break
    return list(dict.fromkeys(texts))


def train_tokenizers(folder: Path, texts: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Return for each kind the path for ours and the options for Megatron's tool."""
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    (folder / "hf").mkdir()
    bpe.save(str(folder / "hf/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "hf/tokenizer_config.json").write_text(json.dumps(config))

    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(  # type: ignore
            sentence_iterator=iter(lines[:200_000]),
            model_prefix=str(folder / kind),
            model_type=kind,
            vocab_size=16000,
            byte_fallback=True,
            num_threads=os.cpu_count(),
            minloglevel=2,
        )

    letters = {chr(i): i for i in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = iter(range(256, 512))
    letters |= {chr(next(others)): i for i in range(256) if i not in letters.values()}
    pieces = [bytes([i]) for i in range(256)]
    for token, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1]):
        if token != "<|endoftext|>" and len(token) > 1:
            pieces.append(bytes(letters[letter] for letter in token))
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for i, piece in enumerate(pieces)
    ]
    (folder / "tiktoken.json").write_text(json.dumps(entries))

    def sentence_piece(kind: str) -> tuple[str, list[str]]:
        path = f"{folder}/{kind}.model"
        return path, ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", path]

    tiktoken = ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", f"{folder}/tiktoken.json"]
    tiktoken += ["--vocab-size", str(len(entries) + 1000), "--tiktoken-num-special-tokens", "1000"]
    return {
        "Hugging Face BPE": (
            f"{folder}/hf",
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{folder}/hf"],
        ),
        "SentencePiece BPE": sentence_piece("bpe"),
        "SentencePiece unigram": sentence_piece("unigram"),
        "tiktoken": (f"{folder}/tiktoken.json", tiktoken),
    }


def run(command: list[str], **environment: str) -> tuple[str, str, float, float]:
    """Return what a command printed, its wall time, and the time that all its processes together had a core."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, done.stderr, time.perf_counter() - began, cpu


def measure(tool: Path, prefix: str, documents: int, workers: int, path: str, options: list[str]) -> dict[str, float]:
    """Prepare `prefix.jsonl` with both programs, compare what they wrote, and return their times and the tokens."""
    command = [sys.executable, str(tool / "tools/preprocess_data.py"), "--input", f"{prefix}.jsonl", "--append-eod"]
    command += ["--output-prefix", f"{prefix}-theirs", "--workers", str(workers), "--log-interval", str(documents)]
    _, said, their_wall, their_cpu = run([*command, *options], PYTHONPATH=str(tool), PYTHONWARNINGS="ignore")
    processed = re.findall(r"Processed (\d+) documents \((\S+) docs/s", said)[-1]
    assert int(processed[0]) == documents
    command = [sys.executable, "-c", "from cli.main import run; run()", "data", "prepare", f"{prefix}.jsonl", "--json"]
    command += ["--tokenizer", path, "--output", f"{prefix}-ours", "--workers", str(workers)]
    said, _, our_wall, our_cpu = run(command)
    for suffix in ("bin", "idx"):
        theirs, ours = Path(f"{prefix}-theirs_text_document.{suffix}"), Path(f"{prefix}-ours.{suffix}")
        assert theirs.read_bytes() == ours.read_bytes(), f"the {suffix} files differ"
        theirs.unlink()
        ours.unlink()
    return {
        "theirs": documents / float(processed[1]),
        "ours": json.loads(said)["seconds"],
        "their wall": their_wall,
        "our wall": our_wall,
        "their cpu": their_cpu,
        "our cpu": our_cpu,
        "tokens": json.loads(said)["tokens"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="append", help="measure this tokenizer alone; may be given several times")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(arguments.megatron), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sources(arguments.megabytes)
        (folder / "large.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        library = [file.path.read_text("utf-8") for file in find_files(DataConfig()).found]
        tokenizers = train_tokenizers(folder, library)

        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
        print(f"{datetime.date.today()}; {cpu}, {os.cpu_count()} cores; Python {platform.python_version()};")
        print(", ".join(f"{library} {version(library)}" for library in LIBRARIES) + f"; Megatron-LM {commit}")
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        print(
            f"{len(texts)} documents, {megabytes:.1f} MB; {arguments.workers} workers; median of {arguments.repeats}\n"
        )
        print("| tokenizer | tokens | Megatron-LM, tokens/s | hybrid, tokens/s | ratio | whole commands | CPU |")
        print("|---|---|---|---|---|---|---|")
        for kind, (path, options) in tokenizers.items():
            if arguments.only and kind not in arguments.only:
                continue
            runs = [
                measure(arguments.megatron, f"{folder}/large", len(texts), arguments.workers, path, options)
                for _ in range(arguments.repeats)
            ]
            whole = {name: statistics.median(each[name] for each in runs) for name in runs[0]}
            ratios = sorted(each["theirs"] / each["ours"] for each in runs)
            tokens = int(whole["tokens"])
            print(
                f"| {kind} | {tokens:,} | {tokens / whole['theirs']:,.0f} | {tokens / whole['ours']:,.0f} "
                f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
                f"| {whole['their wall']:.1f} s, {whole['our wall']:.1f} s "
                f"| {whole['their cpu']:.1f} s, {whole['our cpu']:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
