"""Shards a `TitanModel` over processes, compiles it, and sets up activation checkpointing."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchtitan.distributed.activation_checkpoint import apply_ac

from flame.config.sections import JobConfig
from flame.titan.config import titan_config
from flame.titan.context_parallel import apply_context_parallel
from flame.titan.mesh import Layout
from flame.titan.model import TitanModel

# what activation_checkpoint.selective_ac_option "op" keeps (of mm, apply_ac keeps every second one)
_SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.softpick.normalized_attn_fwd.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def parallelize(model: TitanModel, layout: Layout, config: JobConfig) -> TitanModel:
    """Shards and compiles ``model``, which is on the meta device, in place; parameters keep their names."""
    if layout.tp_enabled:
        _apply_tensor_parallel(
            model, layout.get_mesh("tp"), loss_parallel=not config.training.disable_loss_parallel
        )
    if layout.cp_enabled:
        apply_context_parallel(model.hf, layout.get_mesh("cp"))
    if config.activation_checkpoint.mode != "none":
        titan = titan_config(config).activation_checkpoint
        apply_ac(model.model, titan, op_sac_save_list=_SAVED_OPS)
    if config.training.compile:
        for layer in model.model.layers:
            # in place, so that names in checkpoints do not change
            layer.compile(fullgraph=True)
    if layout.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if layout.dp_replicate_enabled else ["fsdp"]
        _apply_fsdp(model, layout.get_mesh(names), config)
    return model


def _apply_fsdp(model: TitanModel, mesh: DeviceMesh, config: JobConfig) -> None:
    t = config.training
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, t.mixed_precision_param),  # pyright: ignore[reportArgumentType]  # set_precision has replaced None
        # NOTE(numerics): sums of gradients over processes are not rounded to the parameters' dtype
        reduce_dtype=torch.float32,
    )
    offload = CPUOffloadPolicy() if t.enable_cpu_offload else OffloadPolicy()
    # None leaves the choice to torch: free the layers' weights, keep the root's
    reshard = {"default": None, "always": True, "never": False}[t.fsdp_reshard_after_forward]
    for module in (*model.model.layers, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=reshard,
        )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is a sum over the tokens of all processes already
            module.set_gradient_divide_factor(1.0)
            if mesh.device_type == "cpu":
                # "Cannot use ReduceOp.PREMUL_SUM with Gloo"
                module.set_force_sum_reduction_for_comms(True)


def _apply_tensor_parallel(model: TitanModel, mesh: DeviceMesh, *, loss_parallel: bool) -> None:
    """Heads and width over the processes of ``mesh`` within a layer, the sequence between layers.

    Source: torchtitan 0.2.2, models/llama3/infra/parallelize.py, in the names of transformers' Llama.
    """
    parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=Shard(1)
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(
                input_layouts=Shard(1),
                output_layouts=Shard(-1) if loss_parallel else Replicate(),
                use_local_output=not loss_parallel,
            ),
        },
    )
    layer_plan = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.g_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    if not model.hf.config.attn_gate:
        del layer_plan["self_attn.g_proj"]
    for layer in model.model.layers:
        parallelize_module(layer, mesh, layer_plan)
        # parameters with one number per head are sharded like the heads
        for name, x in layer.self_attn.named_parameters(recurse=False):  # pyright: ignore[reportAttributeAccessIssue]  # transformers' decoder layers have self_attn, a module
            shards = nn.Parameter(distribute_tensor(x, mesh, [Shard(0)]))
            layer.self_attn.register_parameter(name, shards)  # pyright: ignore[reportAttributeAccessIssue]  # transformers' decoder layers have self_attn, a module
    # the output of the embedding is an AsyncCollectiveTensor; as the input of a compiled layer it would silently get
    # no gradient (torch 2.13), so it is cloned
    model.model.embed_tokens.register_forward_hook(lambda module, args, hidden: hidden.clone())
    # parallelize_module gave tied embedding and head separate shards
    model.hf.tie_weights(recompute_mapping=False)
