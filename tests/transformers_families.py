"""Small models of several families of transformers, and padded prompts for them."""

import inspect

import torch
from small_model import padded
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)

import flame.models  # noqa: F401  # teaches transformers the operators

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, **GROUPED),
    "qwen3": Qwen3Config(**SHAPE, **GROUPED),
    "mistral, window": MistralConfig(**SHAPE, **GROUPED, sliding_window=6),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "gemma3, windows of some layers": Gemma3TextConfig(
        **SHAPE, **GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss, learned sinks": GptOssConfig(
        **SHAPE, **GROUPED, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
}
# what transformers calls the cache: another name before 5.24
CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)


def model_of(config, implementation="naive_softpick"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # large enough that attention decides
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts(lengths, side):
    """Token ids ``[B, T]``, their attention mask, and the rows without padding."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 97, (length,), generator=generator) for length in lengths]
    return *padded(rows, side), rows


def places(mask):
    """Positions of the tokens in their row."""
    return (mask.cumsum(1) - 1).clamp(min=0)
