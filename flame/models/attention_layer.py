"""Llama's attention with the additions of the arms: a learned sink, an output gate, a scale that depends on the length.

The operator computes the normaliser. This layer prepares its inputs and processes its output.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flame.base.tensors import local_tensor
from flame.models.key_ranges import KeyRanges, MaskSentinel, num_visible_keys
from flame.models.keywords import refuse_unknown
from flame.models.packing import document_bounds

LOG_SCALE_START = 0.3
"""Initial value of ``log_scale``. Source: arXiv:2504.20966, the ablation called scaled."""


class NormalizedAttention(LlamaAttention):
    """Attention of one layer with any normaliser; plain Llama if the configuration turns on none of the three additions.

    With ``q``, ``k``, ``v`` after RoPE and ``x`` the normalised input of the layer::

        s_ij = scale * <q_i, k_j>                                attn_log_scale: times log_scale_h * log n_i
        o_i  = sum_j n(s_ij) v_j / (c + sum_j d(s_ij))           attn_sink: c + e^sinks_h
        y_i  = W_o o_i                                           attn_gate: W_o (o_i * sigmoid(W_g x_i))

    ``n_i`` is the number of keys that query ``i`` sees in its document and row, itself included.

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

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # Llama's accepts None for positions, and declares that it always returns weights
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: KeyRanges | torch.Tensor | MaskSentinel | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        num_keys: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output ``[B, T, hidden]`` of ``hidden_states`` ``[B, T, hidden]``, and weights where they are asked for.

        ``num_keys`` ``[1 or B, T]``, integers, gives ``n_i`` where the local keys do not determine it, that is, under
        context parallelism, which gathers the keys later. ``cache`` is called ``past_key_values`` before transformers
        5.24. Everything else is as in Llama.

        Raises:
            TypeError: Both names of the cache are given, or a keyword is unknown.
        """
        name = type(self).__name__
        refuse_unknown(name, kwargs)
        if cache is not None and past_key_values is not None:
            raise TypeError(f"{name} takes one cache: cache or past_key_values, its older name")
        cache = past_key_values if cache is None else cache
        packing = {
            "position_ids": position_ids,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "seq_idx": seq_idx,
        }
        B, T, _ = hidden_states.shape
        q, k, v = (
            projection(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if self.config.attn_log_scale:
            if num_keys is None:
                S = k.shape[2]
                bounds = document_bounds(name, attention_mask, B=B, T=T, S=S, **packing)
                num_keys = num_visible_keys(B, T, S, attention_mask, bounds, q.device)
            q = _scale_by_length(q, local_tensor(self.log_scale), num_keys)
        options = {**packing, "is_causal": is_causal, "output_attentions": output_attentions}
        if self.config.attn_sink:
            options["s_aux"] = local_tensor(self.sinks)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # pyright: ignore[reportArgumentType]  # transformers sets it when it builds the model
            eager_attention_forward,
        )
        dropout = self.attention_dropout if self.training else 0.0
        o, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **{option: value for option, value in options.items() if value is not None},
            **kwargs,
        )
        o = o.reshape(B, T, -1)
        if self.config.attn_gate:
            o = o * self.g_proj(hidden_states).sigmoid()
        return self.o_proj(o.contiguous()), weights


def _scale_by_length(
    q: torch.Tensor, log_scale: torch.Tensor, num_keys: torch.Tensor
) -> torch.Tensor:
    """Queries ``[B, HQ, T, K]`` times ``log_scale_h * log n_i``, which is a factor on their scores; like ``q``."""
    # NOTE(numerics): factor and product are computed in float32 at least, and rounded to the dtype of q once
    dtype = torch.promote_types(q.dtype, torch.float32)
    factor = log_scale.to(dtype)[:, None] * num_keys.to(dtype).log()[:, None]
    return (q.to(dtype) * factor[..., None]).to(q.dtype)
