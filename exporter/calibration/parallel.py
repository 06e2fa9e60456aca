"""Several processes that share one distillation, started by ``torchrun``.

    torchrun --nproc-per-node 2 -m exporter quantize RECIPE --checkpoint DIR -o DIR

Every process learns from its own part of each batch. With `ddp` each holds the whole student, with
`fsdp` (FSDP2) its rows are spread over all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from exporter.calibration.student import Student, whole

_PATIENCE = timedelta(hours=12)  # one process may round a whole model while the others wait


@contextmanager
def processes() -> Iterator[None]:
    """Join the others where ``torchrun`` started this process; otherwise there is only one."""
    if "RANK" not in os.environ or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    if distributed.is_initialized():
        distributed.barrier()


def mean(value: Tensor) -> Tensor:
    """The mean of a number over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
        value /= world_size()
    return value


def spread(student: Student, kind: Literal["ddp", "fsdp"]) -> nn.Module:
    """The student as this process trains it; alone, it is what was given."""
    if not distributed.is_initialized():
        return student
    if kind == "ddp":
        return DistributedDataParallel(student)
    for layer in student.decoder.model.layers:
        fully_shard(layer)
    fully_shard(student)
    return student


def training_state(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training goes on from, whole, for every process to call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments: Any = get_optimizer_state_dict(student, optimizer, options=options)["state"]
    state = {f"learned.{name}": whole(p.detach()) for name, p in _learned(student)}
    for name, values in moments.items():
        state |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return state


@torch.no_grad()
def restore(student: Student, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """The inverse of `training_state`."""
    for name, parameter in _learned(student):
        value = state[f"learned.{name}"]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
    options = StateDictOptions(full_state_dict=True)
    found: Any = get_optimizer_state_dict(student, optimizer, options=options)
    for name, values in found["state"].items():
        found["state"][name] = {key: state[f"optimizer.{name}.{key}"] for key in values}
    set_optimizer_state_dict(student, optimizer, found, options=options)


def _learned(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)
