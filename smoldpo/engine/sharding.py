"""Weights of which each rank keeps a share (FSDP2, torch's fully_shard).

A layer's weights are whole on every rank while it computes, and gone afterwards; each rank keeps,
updates and saves a share of every weight, of its gradient and of the optimizer's state. Frozen
weights are shared out as well. Gradients are summed where backward passes leave a layer, in the
master precision, so that every rank takes part in every stream's passes (dealing.py).
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from smoldpo.engine.precision import cast, master_dtype
from smoldpo.utils.distributed import Ranks


def mesh_of(ranks: Ranks, device: torch.device) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device.type, (ranks.size,))


def shard(model: torch.nn.Module, mesh: DeviceMesh, compute: torch.dtype) -> None:
    """Leave this rank its share of every weight, in place, in the master precision.

    Layer after layer, so that no more than one of them is held whole and converted.

    Args:
        compute: the precision of matrix products; gradients are summed in the masters'.
    """
    full = master_dtype(compute)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=full, output_dtype=full)
    for module in [*model.get_submodule("model.layers").children(), model]:
        cast(module, full)
        # The outermost too, whose parameters would else be other objects after a forward pass.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the pairs already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
