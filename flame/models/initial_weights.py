"""Initial weights, a function of the seed and the names of the modules only.

Every process draws each whole parameter on the CPU and keeps its shard. The arms of an ablation therefore start from
the same values on any number of processes, in any layout, and on any device.
"""

import hashlib

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel


@torch.no_grad()
def initialize_weights(model: PreTrainedModel, seed: int) -> None:
    """Fills parameters and buffers in place by the rules of ``model._init_weights``, then ties them.

    Args:
        model: Parameters on any device, plain or sharded (`DTensor`).
        seed: Every module draws from a separate stream, given by the seed and the module's name.

    Needs memory for the whole parameters of one module at a time.
    """
    for name, module in model.named_modules():
        # activation checkpointing wraps layers; the wrapper must not change the name
        name = name.replace(_CHECKPOINT_PREFIX, "")
        own = {key: p for key, p in module._parameters.items() if p is not None}
        whole = {
            key: nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
            for key, parameter in own.items()
        }
        for buffer in module.buffers(recurse=False):
            # set when the model was initialised on meta
            buffer._is_hf_initialized = False  # pyright: ignore[reportAttributeAccessIssue]  # a mark that transformers reads; tensors accept new attributes
        module._parameters.update(whole)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_seed_of(seed, name))
                model._init_weights(module)
        finally:
            module._parameters.update(own)
        for key, parameter in own.items():
            if f"{name}.{key}" not in model.all_tied_weights_keys:
                _keep_shard(parameter, whole[key])
    model.tie_weights(recompute_mapping=False)


def _seed_of(seed: int, name: str) -> int:
    # torch's generator on the CPU takes 32 bits
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


def _keep_shard(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, parameter.device_mesh, parameter.placements
    )
    shard = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    parameter.to_local().copy_(whole[shard])
