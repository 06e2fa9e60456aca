"""Distillation in several processes, started by ``torchrun``.

    torchrun --nproc-per-node 2 -m exporter quantize RECIPE --checkpoint DIR -o DIR

Every process trains on its own part of each batch. With `ddp` each process holds the whole student;
with `fsdp` (FSDP2) the rows of its parameters are sharded over all processes.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from exporter.calibration.student import Student, unshard

_TIMEOUT = timedelta(hours=12)  # the other processes wait while the first runs GPTQ


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if ``torchrun`` started this process; otherwise do nothing."""
    if "RANK" not in os.environ or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The index of this process; 0 is the one that writes and reports."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Wait until every process has called this."""
    if distributed.is_initialized():
        distributed.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar tensor over all processes; `value` is overwritten."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value /= world_size()
    return value


def distributed_student(student: Student, kind: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to train: the student wrapped by DDP or FSDP2; in a single process, the student
    itself."""
    if not distributed.is_initialized():
        return student
    if kind == "ddp":
        return DistributedDataParallel(student)
    for layer in student.decoder.model.layers:
        fully_shard(layer)
    fully_shard(student)
    return student


def training_state(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The unsharded parameters and optimizer state, by name. Every process must call this."""
    if isinstance(student, FSDPModule):
        student.reshard()  # an evaluation leaves the root unsharded
    state = dict[str, Tensor]()
    for name, parameter in _learned(student):
        state[f"learned.{name}"] = unshard(parameter.detach())
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{key}.{name}"] = unshard(value)
    return state


@torch.no_grad()
def restore(
    student: Student, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Load what `training_state` returned into the student and the optimizer."""
    for name, parameter in _learned(student):
        parameter.copy_(_sharded_like(state[f"learned.{name}"], parameter))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = state.get(f"optimizer.{key}.{name}")
            if value is not None:  # there is none before the first step
                value = value if key == "step" else _sharded_like(value, parameter)
                optimizer.state[parameter][key] = value


def _sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """An unsharded tensor, sharded over the processes as `parameter` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _learned(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)
