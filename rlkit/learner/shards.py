"""FSDP2: weights, gradients and moments of the learner in shards over its ranks.

Decoder layers are gathered one by one for a forward or backward pass, what is left (embeddings, head) with the policy.
Gradients are reduced after every micro-batch: kept until the last one, each rank would hold them whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlkit.learner.policy import Policy


def shard(policy: Policy, accelerator: Accelerator) -> None:
    """Leave every rank its part of the parameters, on its device, layer by layer; equal on all ranks before."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in list(policy.model.modules()):
        if type(module).__name__ in (policy.model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)  # else forward passes alone leave it whole
    register_fsdp_forward_method(policy, "probe")
    accelerator.prepare_model(policy, device_placement=False, evaluation_mode=True)  # autocast, and no DDP


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which every rank has a part, or of another one. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU, one for names that are tied. Collective; where not `keep`, nothing stays."""
    copies = dict[int, Tensor]()
    for tensor in tensors.values():
        if id(tensor) not in copies:
            full = whole(tensor.detach())
            copies[id(tensor)] = full.to("cpu", copy=True).contiguous() if keep else full.new_empty(0)
    return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else {}


def laid_out_as(tensor: Tensor, like: Any) -> Tensor:
    """A copy on the device of `like`, this rank's part of it if `like` is one. Not collective."""
    moved = tensor.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
