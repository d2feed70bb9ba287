"""FSDP2: weights, gradients and optimiser state in parts, one a process; whole again for checkpoints."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def shard(model: nn.Module, device: torch.device, num_processes: int, bf16: bool) -> None:
    """Shard a model in place, its `blocks` one by one; under bf16 it computes in bfloat16 and adds gradients up in float32."""
    mesh = init_device_mesh(device.type, (num_processes,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # Nothing here writes into a model's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def local(parameters: Any) -> list[Tensor]:
    """This process's part of every parameter, without gradient; of one that is not sharded, all of it."""
    return [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in parameters]


def whole(state: Any) -> Any:
    """A state dict with its sharded tensors put together. All processes must call it."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)


def part_of(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def together(parts: list[Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The inverse of `local`, by name of the parameter. All processes must call it."""
    names = dict(model.named_parameters())
    return {name: _like(part, parameter) for (name, parameter), part in zip(names.items(), parts, strict=True)}


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride()).full_tensor()


def blank(model: nn.Module) -> nn.Module:
    """The model without its weights' memory, to be filled later."""
    return copy.deepcopy(model).to("meta")
