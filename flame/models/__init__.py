"""Importing this package teaches transformers the model ``softpick_transformer`` and every attention
operator of the family, by the operator's name: ``attn_implementation="parallel_softpick_attn"``."""

from transformers import AutoConfig, AutoModelForCausalLM

from flame.models.attention import OPERATORS, normalizer_of, register_operators, require_device
from flame.models.softpick_transformer import (
    SoftpickTransformerConfig,
    SoftpickTransformerForCausalLM,
    read_config,
)

register_operators()
AutoConfig.register(SoftpickTransformerConfig.model_type, SoftpickTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(
    SoftpickTransformerConfig, SoftpickTransformerForCausalLM, exist_ok=True
)

__all__ = [
    "OPERATORS",
    "SoftpickTransformerConfig",
    "SoftpickTransformerForCausalLM",
    "normalizer_of",
    "read_config",
    "require_device",
]
