"""The optimizer's state gathered on the device beside megatron-core's own gathering: the same, bit for bit, where there
is one bucket; and with several, of which one ends in padding, each parameter with its own state.

`python -m tests.hybrid.training.test_optimizer_state SETTINGS` compares the two as one rank of several.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid import settings_file
from hybrid.config import Settings
from tests import toy


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.multiprocess])])
def test_the_gathered_state_is_upstreams_and_both_ways_of_saving_write_it(
    tmp_path: Path, processes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    _compare(toy.settings(tmp_path), processes, capfd)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_parameters_after_a_padded_bucket_keep_their_state(tmp_path: Path) -> None:
    """Tied embeddings have a bucket of their own at the last stage, here after one that ends in padding. In float32 the
    optimizer's parameters are the weights."""
    from tests.parity import tensors as whole

    run = toy.settings(
        tmp_path, model={"layer_pattern": "MMM|MMMMM", "tie_embeddings": True}, parallel={"pipeline": 2}, steps=2
    )
    toy.start([run], processes=2)
    tensors = whole(Path(run.folder) / run.name / "checkpoints/iter_0000002")
    prefix = "optimizer.state.param."
    kept = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    assert "embedding.word_embeddings.weight" in kept
    for name, tensor in kept.items():
        assert tensor.equal(tensors[name]), name


@pytest.mark.gpu
def test_so_it_is_on_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With bf16, where the optimizer's parameters are others than the model's."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    _compare(toy.settings(tmp_path, trainer={"precision": "bf16"}), 1, capfd)


def _compare(run: Settings, processes: int, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(run.folder).parent / "settings.json"
    path.write_text(json.dumps(settings_file.to_dict(run)))
    if processes == 1:
        from hybrid.training import distributed

        try:
            main(str(path))
        finally:
            distributed.stop()
        said = capfd.readouterr().out
    else:
        said = toy.spawn("tests.hybrid.training.test_optimizer_state", [str(path)], processes).stdout
    assert said.count("the same state") == 1
    assert said.count("the same checkpoint") == 1


def main(file: str) -> None:
    import hybrid.quiet  # noqa: F401

    # isort: split
    import torch

    from hybrid.costs.pipeline import stage_pattern
    from hybrid.training import distributed, optimizer_state
    from hybrid.training.setup import set_up

    run = settings_file.from_dict(json.loads(Path(file).read_text()), file)
    world = distributed.start(run.parallel, None, run.trainer.seed)
    training = set_up(run, stage_pattern(run), world.device)
    (optimizer,) = training.optimizer.chained_optimizers  # pyright: ignore[reportAttributeAccessIssue]
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()  # pyright: ignore[reportAttributeAccessIssue]
    training.optimizer.step()
    theirs = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    ours = optimizer_state.gather(optimizer)
    if world.is_main:
        assert ours is not None and ours.keys() == theirs.keys()
        for index in range(len(optimizer.buffers)):
            for dtype, tensors in theirs[index].items():
                assert tensors.keys() == ours[index][dtype].keys()
                for key, tensor in tensors.items():
                    other = ours[index][dtype][key]
                    if torch.is_tensor(tensor):
                        other = other[: len(tensor)].cpu()  # without the padding at the end
                    assert torch.equal(tensor, other) if torch.is_tensor(tensor) else tensor == other, key
        print("the same state")
    else:
        assert ours is None
    _save_twice(run, training, world)


def _save_twice(run: Settings, training: Any, world: Any) -> None:
    """In this process, and staged and written by another one."""
    from dataclasses import replace

    from hybrid.training import checksums
    from hybrid.training.checkpoint import Position
    from hybrid.training.saving import Saver

    asynchronous = replace(run, checkpoint=replace(run.checkpoint, asynchronous=True))
    sums = []
    for name, settings in (("one", run), ("other", asynchronous)):
        saver = Saver(Path(run.folder) / name, settings, None, world)
        finished = [*saver.save(training, Position(2, 8), wait=False), *saver.poll(wait=True)]
        files = json.loads((finished[-1].path / checksums.FILE_NAME).read_text())["files"]
        sums.append({file: entry for file, entry in files.items() if file.endswith(".distcp")})
    assert sums[0] == sums[1]
    if world.is_main:
        print("the same checkpoint")


if __name__ == "__main__":
    main(sys.argv[1])

    from hybrid.training import distributed

    distributed.stop()
