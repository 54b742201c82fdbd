"""The arms of the ablations, and small models of each."""

import torch

from flame.models import SoftpickTransformerConfig

# name -> the normaliser, and what is added to it
ARMS = {
    "softpick": ("softpick", {}),
    "softmax": ("softmax", {}),
    "rectified": ("rectified", {}),
    "relu_softpick": ("relu_softpick", {}),
    "abs_softpick": ("abs_softpick", {}),
    "softmax_plus_one": ("softmax_plus_one", {}),
    "gpt_oss": ("softmax", {"attn_sink": True}),
    "gated": ("softmax", {"attn_gate": True}),
    "scaled softpick": ("softpick", {"attn_log_scale": True}),
    "scaled softmax": ("softmax", {"attn_log_scale": True}),
}
ALL = {"attn_sink": True, "attn_gate": True, "attn_log_scale": True}


def config_of(normalizer, additions, *, operator="naive", **shape):
    return SoftpickTransformerConfig(
        attn_impl=f"{operator}_{normalizer}_attn",
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        | additions
        | shape,
    )


def enlarge(model):
    """Weights so large that attention decides, and heads that differ in what is one number per head."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        start = 0.3 if name.endswith("log_scale") else 0.0
        if p.dim() > 1 or name.endswith(ADDED):
            values = start + 0.3 * torch.randn(p.shape, generator=generator)
            p.data.copy_(values)
    return model


ADDED = ("self_attn.sinks", "self_attn.log_scale", "self_attn.g_proj.weight")
