"""Context parallelism: the processes of a group share every sequence.

Each process holds a part of the queries and gathers all keys and values. The operators take queries as the last
positions of their keys, so a process computes attention of the queries that end at ``end`` over ``keys[:end]``, and
no results have to be merged.

Later queries see more keys, so the sequence is cut into 2N chunks and process ``r`` of N holds the chunks
``r`` and ``2N - 1 - r``. They see ``r + 1`` and ``2N - r`` chunks of keys; the sum is the same for every ``r``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "context_parallel"


def local_rows(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part ``[B, T / size]`` of ``[B, T]`` that process ``rank`` of ``size`` holds."""
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)


def shard_batch(
    input_dict: dict[str, torch.Tensor], labels: torch.Tensor, mesh: DeviceMesh
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """This process's part of a batch, with ``positions`` ``[1, T / N]`` added.

    Args:
        input_dict: ``input``, token ids ``[B, T]``, the same on every process of ``mesh``.
        labels: ``[B, T]``.
        mesh: The N processes that share each sequence; ``T`` is a multiple of ``2 N``.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    input_ids = input_dict["input"]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    sharded = {"input": local_rows(input_ids, rank, size)}
    sharded["positions"] = local_rows(positions, rank, size)
    return sharded, local_rows(labels, rank, size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int, group: str) -> torch.Tensor:
        ctx.size, ctx.group = size, group
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_gather_into_tensor(x, size, group))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares *grads; forward has one output, so there is one
        # NOTE(numerics): the sum over processes is in the dtype of x; the kernel sums each process's part of dk and dv
        # over its queries in float32, and rounds it once
        ops = torch.ops._c10d_functional
        x = ops.reduce_scatter_tensor(grad.contiguous(), "sum", ctx.size, ctx.group)
        return ops.wait_tensor(x), None, None


def gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """Whole sequences ``[..., T, D]`` of the parts ``[..., T / size, D]``; backward sums over processes.

    Args:
        x: This process's part, as `local_rows` picks it.
        size: Number of processes.
        group: Name of the process group.
    """
    # one gather along a new first dimension
    parts = _Gather.apply(x.contiguous()[None], size, group)
    c = x.shape[-2] // 2
    first = [parts[rank, ..., :c, :] for rank in range(size)]
    second = [parts[rank, ..., c:, :] for rank in reversed(range(size))]
    return torch.cat((*first, *second), dim=-2)


def attend_local_queries(
    attention: Callable[..., tuple[torch.Tensor, None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    rank: int,
    size: int,
    **kwargs: Any,
) -> torch.Tensor:
    """Causal attention of the queries that process ``rank`` of ``size`` holds.

    Args:
        attention: Attention as transformers calls it; queries are the last rows of the keys.
        module: The layer's attention module, passed on.
        query: ``[B, HQ, T / size, K]``, the rows that `local_rows` picks.
        key: ``[B, H, T, K]``, in order.
        value: ``[B, H, T, V]``, in order.
        *args: Further arguments of ``attention``.
        rank: This process.
        size: Number of processes that share a sequence.
        **kwargs: Further arguments of ``attention``.

    Returns:
        ``[B, T / size, HQ, V]``.
    """
    c = query.shape[2] // 2
    outputs = []
    for chunk, rows in ((rank, query[:, :, :c]), (2 * size - 1 - rank, query[:, :, c:])):
        end = (chunk + 1) * c
        o, _ = attention(module, rows, key[:, :, :end], value[:, :, :end], *args, **kwargs)
        outputs.append(o)
    return torch.cat(outputs, dim=1)


def apply_context_parallel(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Makes the attention of ``model`` take its keys and values from all processes of ``mesh``."""
    attention = ALL_ATTENTION_FUNCTIONS[model.config.attn_impl]
    rank, size = mesh.get_local_rank(), mesh.size()
    # by name: the registered function lives until the process exits, and must not keep the group alive
    group = str(mesh.get_group().group_name)

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        # one collective for both: keys and values have the same shape in every model here
        key, value = gather(torch.stack((key, value)), size, group)
        o = attend_local_queries(
            attention, module, query, key, value, *args, rank=rank, size=size, **kwargs
        )
        return o, None

    AttentionInterface.register(_NAME, forward)
    model.config._attn_implementation = _NAME
