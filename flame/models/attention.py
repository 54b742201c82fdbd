"""The attention operators as transformers' models call them, under names of their own.

``attn_implementation="softpick"``, or another name of `IMPLEMENTATIONS`, makes any decoder of transformers that
follows its attention interface (Llama, Qwen, Mistral, Gemma, GPT-NeoX and so on) compute that normaliser: causal
attention with grouped heads, sliding windows, learned sinks, rows padded on either side, and every cache. What cannot be
right is refused by name, since transformers would otherwise compute something else.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import fla.ops.attn.softpick as softpick_ops
from fla.ops.attn.softpick import NORMALIZERS
from flame.errors import UsageError
from flame.models.key_ranges import (
    KeyRanges,
    attend,
    causal_key_ranges,
    require_one_sequence,
    weights,
)

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
"""What ``attn_implementation`` may be, and the operator that it is: ``softpick`` is Triton, ``naive_softpick`` PyTorch."""

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
    """The operator of that name as transformers calls attention."""
    operator = OPERATORS[name]
    normalizer, is_triton = normalizer_of(name), name.startswith("parallel_")

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        value: torch.Tensor,  # [B, H, S, V]
        attention_mask: KeyRanges | torch.Tensor | str | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(attention_mask, torch.Tensor):
            raise NotImplementedError(
                f"{name} takes causal attention over padded rows, not a mask of shape {tuple(attention_mask.shape)}"
            )
        if dropout:
            raise NotImplementedError(
                f"{name} has no dropout, got {dropout}: set attention_dropout to 0"
            )
        if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
            raise NotImplementedError(f"{name} is causal; is_causal=False is not possible")
        if kwargs.get("softcap") is not None:
            raise NotImplementedError(
                f"{name} does not cap scores, got softcap {kwargs['softcap']}"
            )
        # of packed sequences, as transformers passes them to flash attention
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not kwargs.get("cu_seq_lens_k"):
            raise NotImplementedError(
                f"{name} packs queries and keys alike: cu_seq_lens_q and cu_seq_lens_k must be one tensor"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        options = {"window_size": sliding_window, "sink_bias": s_aux}
        if isinstance(attention_mask, str):
            # `MAYBE_PACKED`
            attention_mask = None
            if cu_seqlens is None:
                require_one_sequence(name, kwargs.get("position_ids"))
        if attention_mask is not None and cu_seqlens is not None:
            raise NotImplementedError(f"{name} takes packed sequences or padded rows, not both")
        w = None
        if kwargs.get("output_attentions"):
            # dense, by the reference, whatever the operator
            w = weights(
                q,
                k,
                v,
                attention_mask,
                normalizer=normalizer,
                scale=scaling,
                cu_seqlens=cu_seqlens,
                **options,
            )
        if attention_mask is None:
            return operator(q, k, v, scaling, cu_seqlens, **options), w
        o = attend(
            q,
            k,
            v,
            attention_mask,
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
