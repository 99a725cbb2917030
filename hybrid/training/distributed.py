"""Starting and ending the processes' common life: device, process groups, seeds."""

import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from hybrid.config import ParallelConfig
from hybrid.model import cpu


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, *values: float) -> list[list[float]]:
        """Some numbers of each process in float64, by number and then by rank."""
        if self.size == 1:
            return [[value] for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        gathered = torch.empty(self.size * len(values), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.size, -1).T.tolist()

    def texts(self, text: str) -> list[str]:
        """A text of each process, by rank."""
        if self.size == 1:
            return [text]
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, text)
        return texts

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.total(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def world_size() -> int:
    """Processes of this run: torchrun's WORLD_SIZE, else one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(parallel: ParallelConfig, virtual_stages: int | None, seed: int) -> World:
    """Join the other processes: NCCL on CUDA devices, gloo on the CPU. Alone, no port is opened."""
    rank, size = int(os.environ.get("RANK", "0")), world_size()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        cpu.enable()
        device = torch.device("cpu")
        backend = "gloo"
    if not dist.is_initialized():
        if size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
    )
    set_seed(seed)
    return World(rank, size, device)


def set_seed(seed: int) -> None:
    """Seed every generator: the same on the ranks of a tensor-parallel group, another one on each pipeline stage."""
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def stop() -> None:
    """Leave the process groups, so that another run can start in this process."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
