"""Generation on one GPU: this engine, transformers' `generate` and megatron-core's static engine, in one run.

    python benchmarks/generation_gpu.py [--no-transformers] [--no-megatron] [--no-load] [--shrink]

The shapes of `hybrid_8b` in bf16 with random weights, prompts of 512 tokens, greedy. Everything is said as it comes;
what fails is said, and the rest goes on. On an H200 all of it is meant to take less than nine minutes, most of which
are kernels being compiled and chosen. `--shrink` makes the model small enough for a CPU, to try the script.
"""

import argparse
import gc
import random
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

if torch.cuda.is_available():  # transformer-engine wants to find its cuDNN before anything else has loaded one
    import hybrid.quiet  # noqa: F401

# isort: split
from converters import megatron, naming
from hybrid.config import ModelConfig, Settings
from hybrid.data.tokenizer import ByteTokenizer
from hybrid.generation import weights
from hybrid.generation.engine import Job
from hybrid.generation.generator import Generator
from hybrid.generation.runner import Room, Runner
from hybrid.generation.sampling import Sampling
from hybrid.generation.text import Piece

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
STARTED = time.monotonic()
BATCHES = (1, 8, 32, 128)


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


@contextmanager
def part(name: str) -> Iterator[None]:
    """One part of the run; the next one is made, whatever becomes of it."""
    say(f"-- {name}")
    try:
        yield
    except Exception:
        traceback.print_exc()
        say(f"{name} FAILED")
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - started


def settings(shrink: bool) -> Settings:
    from recipes import apply, resolve
    from recipes import settings as settings_of

    small = (
        "hidden_size=128 ffn_hidden_size=256 num_attention_heads=8 num_query_groups=2 mamba_head_dim=32 vocab_size=512"
    )
    changes = [f"model.{each}" for each in small.split()] + ["model.layer_pattern=M-M*"]
    common = ["parallel=single", "data=mock", "trainer.precision=bf16" if CUDA else "trainer.precision=fp32"]
    return settings_of(apply(resolve("hybrid_8b"), [*common, *(changes if shrink else [])]))


def make_weights(model: ModelConfig) -> weights.Weights:
    """Random weights of the sizes that a fresh model has, made where they are used."""
    shapes = {megatron.live_name(name, model): param.shape for name, param in naming.parameters(model).items()}
    generator = torch.Generator(DEVICE).manual_seed(1)

    def take(name: str) -> torch.Tensor:
        made = torch.empty(shapes[name], device=DEVICE, dtype=DTYPE)
        if "norm" in name or name.endswith((".D", "A_log")):
            return made.fill_(1.0)
        return made.normal_(0, 0.02, generator=generator)

    return weights.build(model, take, device=DEVICE, dtype=DTYPE)


def copy_speed() -> float:
    """Bytes a second of a copy on the device, reads and writes counted."""
    size = 2**32 if CUDA else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    source.random_()
    times = [seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * size / statistics.median(times)


def state_update(model: ModelConfig, batch: int, speed: float) -> None:
    """The recurrence of one layer: its bytes over its time. Several states take turns, so that no cache helps."""
    from hybrid.generation import ops

    heads, width, groups, size = (
        model.mamba_inner_size // model.mamba_head_dim, model.mamba_head_dim, model.mamba_num_groups,
        model.mamba_state_dim,
    )  # fmt: skip
    made: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
    states = [torch.randn(batch, heads, width, size, **made) for _ in range(4)]
    x, dt = torch.randn(batch, heads, width, **made), torch.randn(batch, heads, **made)
    B, C = (torch.randn(batch, groups, size, **made) for _ in range(2))
    bias, A, D = (torch.randn(heads, device=DEVICE) for _ in range(3))
    A = -A.abs()

    def all_states() -> None:
        for state in states:
            ops.ssm_step(state, x, dt, bias, A, B, C, D)

    all_states()
    took = statistics.median(seconds(all_states) for _ in range(20)) / len(states)
    moved = 2 * states[0].nbytes
    rate = moved / took
    say(f"state update, B={batch}: {took * 1e6:.0f} us, {rate / 1e12:.2f} TB/s, {rate / speed:.0%} of a copy's")


def decode(runner: Runner, batch: int, prompt: list[int], steps: int) -> None:
    """Steps of the runner alone: a token of each row to the device, logits, the likeliest token back."""
    row = runner.reading_rows[0]
    runner.reset(row)
    for start in range(0, len(prompt), runner.room.prefill_chunk):
        runner.read([row], [prompt[start : start + runner.room.prefill_chunk]])
    for target in range(batch):
        runner.copy(row, target)
    tokens = [1] * batch

    def step() -> None:
        tokens[:] = runner.step(tokens).argmax(-1).tolist()

    for _ in range(5):
        step()
    times = [seconds(step) for _ in range(steps)]
    took = statistics.median(times)
    say(f"ours, steps alone, B={batch}: {batch / took:,.0f} tokens/s ({took * 1e3:.2f} ms a step)")


def prefill(runner: Runner, count: int, prompt: list[int]) -> None:
    """`count` prompts, as many at once as the runner takes."""
    rows = list(runner.reading_rows)[: runner.prefill_together]

    def all_prompts() -> None:
        for _ in range(0, count, len(rows)):
            for row in rows:
                runner.reset(row)
            for start in range(0, len(prompt), runner.room.prefill_chunk):
                piece = prompt[start : start + runner.room.prefill_chunk]
                runner.read(rows, [piece] * len(rows))

    all_prompts()
    took = min(seconds(all_prompts) for _ in range(2))
    say(f"ours, prefill of {count} x {len(prompt)}: {took * 1e3:,.0f} ms, {len(rows)} at once")


def through_the_engine(model: Generator, prompt: list[int], tokens: int) -> None:
    """Whole texts: prefill, decoding, and Python's part for each token."""
    ask: dict[str, Any] = {"temperature": 0, "ignore_end": True}
    list(model.stream(prompt, max_tokens=4, **ask))
    waits = []
    for _ in range(5):
        started = time.perf_counter()
        pieces = model.stream(prompt, max_tokens=2, **ask)
        next(iter(pieces))
        waits.append(time.perf_counter() - started)
        list(pieces)
    say(f"ours, first token of a prompt of {len(prompt)}: {statistics.median(waits) * 1e3:.1f} ms")
    for batch in BATCHES:
        if batch <= model.engine.runner.room.slots:
            rate, whole = all_together(model, prompt, batch, tokens)
            say(f"ours, engine, B={batch}: {rate:,.0f} tokens/s while all are decoded; with prefill {whole:,.0f}")


def all_together(model: Generator, prompt: list[int], batch: int, tokens: int) -> tuple[float, float]:
    """`batch` texts asked for at once, each long enough that there are `tokens` steps in which all of them are decoded.

    Returns tokens/s between the last text's first token and the first text's last, and from the first request on.
    """
    reads = -(-len(prompt) // model.engine.runner.room.prefill_chunk) * batch
    times: list[list[float]] = [[] for _ in range(batch)]
    done = threading.Semaphore(0)

    def listener(index: int) -> Callable[[Piece], None]:
        def listen(piece: Piece) -> None:
            if piece.reason:
                done.release()
            else:
                times[index].append(time.perf_counter())

        return listen

    sampling = Sampling(max_tokens=tokens + min(reads, 1024), temperature=0, ignore_end=True)
    started = time.perf_counter()
    for index in range(batch):
        model.start(prompt, sampling, listener(index))
    for _ in range(batch):
        done.acquire()
    first, last = max(own[0] for own in times), min(own[-1] for own in times)
    between = sum(first < at <= last for own in times for at in own)
    return between / (last - first), sum(map(len, times)) / (max(own[-1] for own in times) - started)


def load(model: Generator, rate: float, duration: float) -> None:
    """Requests at random times, whether the earlier ones are done or not: lengths from 32 to 1024 and 16 to 256."""
    chance = random.Random(0)
    first: list[float] = []
    between: list[float] = []
    ends: list[str] = []
    done = threading.Event()
    most, expected = model.engine.runner.room.max_length, max(1, round(rate * duration))

    def listener(asked: float) -> Callable[[Piece], None]:
        last = 0.0

        def listen(piece: Piece) -> None:
            nonlocal last
            now = time.monotonic()
            if piece.reason:
                ends.append(piece.reason)
                if len(ends) == expected:
                    done.set()
                return
            (between if last else first).append(now - (last or asked))
            last = now

        return listen

    started = asked = time.monotonic()
    jobs: list[Job] = []
    for _ in range(expected):
        asked += chance.expovariate(rate)
        time.sleep(max(0.0, asked - time.monotonic()))
        length, tokens = chance.randint(32, most // 2), chance.randint(16, most // 4)
        sampling = Sampling(max_tokens=tokens, temperature=0, ignore_end=True)
        prompt = [chance.randrange(256) for _ in range(length)]
        jobs.append(model.start(prompt, sampling, listener(time.monotonic())))
    done.wait(120)
    took = time.monotonic() - started
    finished = f"{ends.count('length')} of {expected} finished"
    say(f"ours, {rate:g} requests a second for {duration:.0f} s: {finished}, in {took:.0f} s")
    say(f"  {sum(job.row.position for job in jobs) / took:,.0f} tokens/s; left over: {model.engine.running}")
    for name, times in (("first token", first), ("per token", between)):
        cuts = statistics.quantiles(times, n=100)
        say(f"  {name}: p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms")


def transformers_generate(model: ModelConfig, length: int, tokens: int) -> None:
    """NemotronHForCausalLM of the same shapes, with mamba-ssm's kernels where they are installed."""
    import transformers

    heads = model.mamba_inner_size // model.mamba_head_dim
    pattern = str(model.pattern).replace("|", "")
    config = transformers.NemotronHConfig(
        hybrid_override_pattern=pattern, num_hidden_layers=len(pattern), hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size, num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.query_groups, head_dim=model.head_dim, mamba_num_heads=heads,
        mamba_head_dim=model.mamba_head_dim, n_groups=model.mamba_num_groups, ssm_state_size=model.mamba_state_dim,
        vocab_size=model.padded_vocab_size, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(DEVICE):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    for batch in BATCHES:
        given = torch.randint(256, (batch, length), device=DEVICE)

        def run(count: int) -> None:
            theirs.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=count,  # noqa: B023
                max_new_tokens=count, use_cache=True,
            )  # fmt: skip

        run(2)
        one, all_ = seconds(lambda: run(1)), seconds(lambda: run(tokens + 1))
        say(f"transformers, B={batch}: {batch * tokens / (all_ - one):,.0f} tokens/s; prefill {one * 1e3:,.0f} ms")


def megatron_static(settings: Settings, length: int, tokens: int) -> None:
    """megatron-core's model with its static context, which its engine of that name steps as this does."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from hybrid.costs.pipeline import stage_pattern
    from hybrid.model.build import transformer_config
    from hybrid.training.distributed import start, stop

    start(settings.parallel, None, seed=7)
    model, pattern = settings.model, stage_pattern(settings)
    with torch.device(DEVICE):
        # Its own layers: those of this project's training do not take its context.
        made: Any = HybridModel(
            config=transformer_config(settings, pattern), hybrid_stack_spec=hybrid_stack_spec,
            vocab_size=model.padded_vocab_size, max_sequence_length=length + tokens + 8,
            hybrid_layer_pattern=str(pattern), share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",
        )  # fmt: skip
    theirs = made.to(DEVICE, DTYPE).eval()
    assert model.position_embedding == "none"
    for batch in BATCHES:
        context = StaticInferenceContext(batch, length + tokens + 8)

        def forward(given: torch.Tensor) -> torch.Tensor:
            offset = context.sequence_len_offset  # noqa: B023
            positions = torch.arange(offset, offset + given.shape[1], device=DEVICE).expand_as(given)
            logits = theirs(given, positions, None, inference_context=context, runtime_gather_output=True)  # noqa: B023
            context.sequence_len_offset += given.shape[1]  # noqa: B023
            return logits[:, -1].argmax(-1, keepdim=True)

        with torch.inference_mode(), InferenceMode.active():
            given = torch.randint(256, (batch, length), device=DEVICE)
            forward(given)
            context.sequence_len_offset = 0
            one = seconds(lambda: forward(given))  # noqa: B023
            context.enable_decode_mode()
            token = forward(torch.ones(batch, 1, dtype=torch.int64, device=DEVICE))

            def steps() -> None:
                nonlocal token
                for _ in range(tokens):
                    token = forward(token)

            took = seconds(steps)
        say(f"megatron-core, B={batch}: {batch * tokens / took:,.0f} tokens/s; prefill {one * 1e3:,.0f} ms")
    stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", action="store_true", help="a model for a CPU")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--no-megatron", action="store_true")
    parser.add_argument("--no-load", action="store_true")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0, 30.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    given = parser.parse_args()
    for name in ("torch", "transformers", "megatron-core", "mamba-ssm", "causal-conv1d", "transformer-engine"):
        try:
            say(f"{name} {version(name)}")
        except PackageNotFoundError:
            say(f"{name} is not installed")
    say(torch.cuda.get_device_name() if CUDA else "CPU")
    run, prompt = settings(given.shrink), [i % 256 for i in range(given.prompt)]
    model = run.model
    speed = copy_speed()
    say(f"copy: {speed / 1e12:.2f} TB/s")
    with part("state update"):
        for batch in BATCHES:
            state_update(model, batch, speed)
    with part("ours"):
        runner = Runner(make_weights(model), Room(slots=max(BATCHES), max_length=2048, prefill_chunk=512))
        say("weights made, graphs captured")
        for batch in BATCHES:
            decode(runner, batch, prompt, given.tokens)
        prefill(runner, max(BATCHES), prompt)
        with Generator(runner, ByteTokenizer(), "ours", max_waiting=10**6) as ours:
            through_the_engine(ours, prompt, given.tokens)
            if not given.no_load:
                for rate in given.rates:
                    load(ours, rate, given.seconds)
        del runner, ours
    if not given.no_transformers:
        with part("transformers"):
            transformers_generate(model, given.prompt, min(given.tokens, 32))
    if not given.no_megatron:
        with part("megatron-core"):
            megatron_static(replace(run, model=model), given.prompt, given.tokens)
    say("done")


if __name__ == "__main__":
    main()
