"""Several processes that share one distillation, started by ``torchrun``.

    torchrun --nproc-per-node 2 -m exporter quantize RECIPE --checkpoint DIR -o DIR

Every process learns from its own part of each batch. With `ddp` each holds the whole student, with
`fsdp` (FSDP2) its rows are spread over all of them.
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
    """Everything that training goes on from, whole; every process calls it."""
    if isinstance(student, FSDPModule):
        student.reshard()  # after an evaluation the root is still whole, and not what is optimized
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
    """The inverse of `training_state`."""
    for name, parameter in _learned(student):
        parameter.copy_(_placed(state[f"learned.{name}"], parameter))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = state.get(f"optimizer.{key}.{name}")
            if value is not None:  # none before the first step
                value = value if key == "step" else _placed(value, parameter)
                optimizer.state[parameter][key] = value


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread over processes as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _learned(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)
