"""Registers the attention operators with transformers, under their own names.

``attn_implementation="softpick"``, or another name of `IMPLEMENTATIONS`, makes any decoder of transformers that
follows its attention interface (Llama, Qwen, Mistral, Gemma, GPT-NeoX and so on) compute that normaliser: causal
attention with grouped heads, sliding windows, learned sinks, rows padded on either side, and every cache. What the
operators cannot compute is refused by name, since transformers would otherwise compute something else.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import fla.ops.attn.softpick as softpick_ops
from fla.ops.attn.softpick import NORMALIZERS
from flame.base.errors import UsageError
from flame.models.key_ranges import (
    KeyRanges,
    MaskSentinel,
    attend_key_ranges,
    causal_key_ranges,
    dense_attention_weights,
)
from flame.models.keywords import refuse_unknown
from flame.models.packing import document_bounds

OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(softpick_ops, name)
    for prefix in ("parallel", "naive")
    for name in (f"{prefix}_{normalizer}_attn" for normalizer in NORMALIZERS)
}
"""Operator by name, ``parallel_<normalizer>_attn`` in Triton and ``naive_<normalizer>_attn`` in PyTorch."""

IMPLEMENTATIONS: dict[str, str] = {
    **{name: name for name in OPERATORS},
    **{normalizer: f"parallel_{normalizer}_attn" for normalizer in NORMALIZERS},
    **{f"naive_{normalizer}": f"naive_{normalizer}_attn" for normalizer in NORMALIZERS},
}
"""Values of ``attn_implementation`` -> operator: ``softpick`` is Triton, ``naive_softpick`` PyTorch."""

# transformers' own implementations, all of them softmax
_SOFTMAX_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)


def normalizer_of(name: str) -> str:
    """The normaliser that an operator or a transformers implementation computes.

    Raises:
        ValueError: No operator has that name.
    """
    if name in _SOFTMAX_IMPLEMENTATIONS:
        return "softmax"
    operator = IMPLEMENTATIONS.get(name)
    if operator is None:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {name!r}"
        )
    return operator.removeprefix("parallel_").removeprefix("naive_").removesuffix("_attn")


def require_device(name: str, device_type: str) -> None:
    """Raises UsageError where an operator cannot run on a device."""
    if name.startswith("parallel_") and device_type != "cuda":
        raise UsageError(
            f'attn_impl "{name}" is a Triton kernel and needs a GPU, but this machine has none that torch '
            f'sees; on a CPU use "{name.replace("parallel_", "naive_", 1)}" in --model.config'
        )


def attention_forward(name: str) -> Callable[..., Any]:
    """The operator of that name as transformers calls attention.

    Returns:
        A function of ``query [B, HQ, T, K]``, ``key [B, H, S, K]`` and ``value [B, H, S, V]`` that returns the output
        ``[B, T, HQ, V]`` and the weights ``[B, HQ, T, S]``, or None unless ``output_attentions`` is set. It raises
        NotImplementedError for what the operator cannot compute, and TypeError for an unknown keyword.
    """
    operator = OPERATORS[name]
    normalizer, is_triton = normalizer_of(name), name.startswith("parallel_")

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        value: torch.Tensor,  # [B, H, S, V]
        attention_mask: KeyRanges | torch.Tensor | MaskSentinel | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse_unknown(name, kwargs)
        if isinstance(attention_mask, torch.Tensor):
            raise NotImplementedError(
                f"{name} takes causal attention over padded rows, not a mask of shape {tuple(attention_mask.shape)}"
            )
        if dropout:
            raise NotImplementedError(
                f"{name} has no dropout, got {dropout}: set attention_dropout to 0"
            )
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise NotImplementedError(f"{name} computes causal attention only, got is_causal=False")
        if softcap is not None:
            raise NotImplementedError(f"{name} does not cap scores, got softcap {softcap}")
        if position_bias is not None:
            raise NotImplementedError(f"{name} adds nothing to scores, got a position_bias")
        # views: the operators take any strides. With head_first=True the output would lie in memory as
        # [B, HQ, T, V], and the model, which joins the heads of each token, would copy it
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        B, T = q.shape[:2]
        cu_seqlens = document_bounds(
            name,
            attention_mask,
            B=B,
            T=T,
            S=k.shape[1],
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            seq_idx=seq_idx,
        )
        ranges = attention_mask if isinstance(attention_mask, KeyRanges) else None
        if cu_seqlens is not None and cu_seq_lens_q is None:
            # lay the rows end to end as one packed row
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        options = {"window_size": sliding_window, "sink_bias": s_aux}
        w = None
        if output_attentions:
            # computed densely by the reference, whichever operator runs
            w = dense_attention_weights(
                q,
                k,
                v,
                ranges,
                normalizer=normalizer,
                scale=scaling,
                cu_seqlens=cu_seqlens,
                **options,
            )
            if w.shape[0] != B:
                # the diagonal block [T, T] of each row in [B * T, B * T]
                w = w[0].unflatten(2, (B, T)).unflatten(1, (B, T)).diagonal(dim1=1, dim2=3)
                w = w.movedim(-1, 0)
        if ranges is None:
            o = operator(q, k, v, scaling, cu_seqlens, **options)
            return o.reshape(B, T, *o.shape[2:]), w
        o = attend_key_ranges(
            q,
            k,
            v,
            ranges,
            operator=operator,
            normalizer=normalizer,
            is_triton=is_triton,
            scale=scaling,
            **options,
        )
        return o, w

    return forward


def register_operators() -> None:
    """Registers every name of `IMPLEMENTATIONS` with transformers, with the mask that it takes."""
    for name, operator in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, attention_forward(operator))
        AttentionMaskInterface.register(name, causal_key_ranges)
