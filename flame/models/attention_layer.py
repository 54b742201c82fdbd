"""Llama's attention with what the arms of an ablation add to it: a learned sink, an output gate, a scale with the length.

The normaliser is the operator's. What is here is around it: what goes into the operator, and what becomes of its output.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flame.models.key_ranges import KeyRanges, num_visible_keys

LOG_SCALE_START = 0.3
"""Initial value of ``log_scale``. Source: arXiv:2504.20966, the ablation called scaled."""


class SoftpickAttention(LlamaAttention):
    """Attention of one layer; plain Llama where the configuration asks for none of the three.

    With ``q``, ``k``, ``v`` after RoPE and ``x`` the normalised input of the layer::

        s_ij = scale * <q_i, k_j>                                attn_log_scale: times log_scale_h * log n_i
        o_i  = sum_j n(s_ij) v_j / (c + sum_j d(s_ij))           attn_sink: c + e^sinks_h
        y_i  = W_o o_i                                           attn_gate: W_o (o_i * sigmoid(W_g x_i))

    ``n_i`` is the number of keys that query ``i`` sees, itself included: of its own document and row alone.

    sinks: ``[HQ]``, a score of each query head, as gpt-oss has it.
    log_scale: ``[HQ]``, a factor of each query head (SSMax, arXiv:2501.19399).
    g_proj: ``[HQ * D, hidden]``, a gate of each element of each head's output (arXiv:2505.06708).
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        heads = config.num_attention_heads
        if config.attn_sink:
            self.sinks = nn.Parameter(torch.empty(heads))
        if config.attn_log_scale:
            self.log_scale = nn.Parameter(torch.empty(heads))
        if config.attn_gate:
            self.g_proj = nn.Linear(
                config.hidden_size, heads * self.head_dim, bias=config.attention_bias
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: KeyRanges | torch.Tensor | None = None,
        past_key_values: Any = None,
        num_keys: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output ``[B, T, hidden]`` of ``hidden_states`` ``[B, T, hidden]``, and weights where they are asked for.

        ``num_keys`` ``[1 or B, T]``, integers, are the ``n_i`` where the keys that are here do not tell: under
        context parallelism, which gathers them later. Everything else is as in Llama.
        """
        B, T, _ = hidden_states.shape
        q, k, v = (
            projection(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.config.attn_log_scale:
            if num_keys is None:
                cu_seqlens = kwargs.get("cu_seq_lens_q")
                num_keys = num_visible_keys(T, k.shape[2], attention_mask, cu_seqlens, q.device)
            q = _scale_by_length(q, _own_heads(self.log_scale), num_keys)
        if self.config.attn_sink:
            kwargs["s_aux"] = _own_heads(self.sinks)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        o, weights = attention(
            self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        o = o.reshape(B, T, -1)
        if self.config.attn_gate:
            o = o * self.g_proj(hidden_states).sigmoid()
        return self.o_proj(o.contiguous()), weights


def _scale_by_length(
    q: torch.Tensor, log_scale: torch.Tensor, num_keys: torch.Tensor
) -> torch.Tensor:
    """Queries ``[B, HQ, T, K]`` times ``log_scale_h * log n_i``, which is a factor on their scores; like ``q``."""
    # NOTE(numerics): the factor and the product in float32 at least, rounded to the dtype of q once
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor = log_scale.to(dtype)[:, None] * num_keys.to(dtype).log()[:, None]
    return (q.to(dtype) * factor[..., None]).to(q.dtype)


def _own_heads(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter ``[HQ]``: its own heads under tensor parallelism."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
