"""How a `TitanModel` is compiled and spread over processes: FSDP2, HSDP or DDP."""

import torch
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.titan import TitanModel

# isort: split
from torchtitan.distributed import ParallelDims


def parallelize(model: TitanModel, parallel_dims: ParallelDims, config: JobConfig) -> TitanModel:
    """Compiles and wraps ``model``, on the meta device, in place."""
    layers = model.model.layers
    if config.training.compile:
        for layer in layers:
            # in place, so that names in checkpoints do not change
            layer.compile(fullgraph=True)
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        mesh = parallel_dims.get_mesh(names)
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.training.mixed_precision_param),
            reduce_dtype=torch.float32,
        )
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # the loss is a sum over the tokens of all processes already
                module.set_gradient_divide_factor(1.0)
                if mesh.device_type == "cpu":
                    # "Cannot use ReduceOp.PREMUL_SUM with Gloo"
                    module.set_force_sum_reduction_for_comms(True)
    elif parallel_dims.dp_replicate_enabled:
        replicate(model, device_mesh=parallel_dims.get_mesh("dp_replicate"), bucket_cap_mb=100)
    return model
