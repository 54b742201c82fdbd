"""Importing this package teaches transformers the model ``softpick_transformer`` and every attention
operator of the family: ``attn_implementation="softpick"`` in Triton, ``"naive_softpick"`` in PyTorch, and so on.
"""

import warnings

from transformers import AutoConfig, AutoModelForCausalLM

with warnings.catch_warnings():
    # upstream warns on every machine without a GPU; `require_device` says what follows from that
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    import fla.ops.attn.softpick  # noqa: F401

# isort: split
from flame.models.attention import OPERATORS, normalizer_of, register_operators, require_device
from flame.models.interface import require_attention_interface
from flame.models.saved_configs import save_implementations
from flame.models.softpick_transformer import (
    SoftpickTransformerConfig,
    SoftpickTransformerForCausalLM,
    read_config,
)

register_operators()
save_implementations()
require_attention_interface()
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
