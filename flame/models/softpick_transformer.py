"""``softpick_transformer``: Llama's block (RMSNorm, RoPE, SwiGLU) with a configurable attention operator.

The operator is saved with the weights. Weights trained with one normaliser compute something else with another, so
loading them with another is an error unless ``attn_impl`` itself is set.
"""

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers import initialization as init

from flame.base.command_line import closest
from flame.models.attention import IMPLEMENTATIONS, OPERATORS, normalizer_of
from flame.models.attention_layer import LOG_SCALE_START, NormalizedAttention

ADDITIONS = ("attn_sink", "attn_gate", "attn_log_scale")
"""Fields of the configuration that add a component to the attention, whatever the normaliser."""


@strict
class SoftpickTransformerConfig(LlamaConfig):
    """Llama's configuration with the fields in which the arms of an ablation differ; `NormalizedAttention` has the formulas.

    Args:
        attn_impl: Attention operator by name, see `flame.models.attention.OPERATORS`. Saved with the
            model. ``from_pretrained(..., attn_implementation=...)`` may pick another operator with the
            same normaliser, say the PyTorch reference on a CPU; another normaliser takes
            ``from_pretrained(..., attn_impl=...)``.
        attn_sink: A learned score of each query head takes part in the denominator (gpt-oss).
        attn_gate: A sigmoid of the layer's normalised input gates each element of the heads' outputs.
        attn_log_scale: A learned factor of each query head, times the logarithm of the number of keys a query
            sees, multiplies its scores (SSMax).
    """

    model_type = "softpick_transformer"

    attn_impl: str = "parallel_softpick_attn"
    attn_sink: bool = False
    attn_gate: bool = False
    attn_log_scale: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attn_impl not in OPERATORS:
            raise ValueError(
                f"attn_impl must be one of {', '.join(OPERATORS)}; got {self.attn_impl!r}"
            )
        super().__post_init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields to save. Additions that are off are left out, so that older models and runs stay equal."""
        return {
            name: value
            for name, value in super().to_diff_dict().items()
            if value or name not in ADDITIONS
        }

    # transformers reads and sets this property when it selects an implementation, and would select its own
    # softmax by default
    @property
    def _attn_implementation(self) -> str:
        return self._attn_implementation_internal or self.attn_impl

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]  # transformers declares a property too, with another type
        self._attn_implementation_internal = value


class _Initialized:
    """Initialises the parameters that `NormalizedAttention` adds to Llama's; transformers initialises the rest."""

    config: SoftpickTransformerConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # pyright: ignore[reportAttributeAccessIssue]  # the class that this is mixed into has it
        if isinstance(module, NormalizedAttention):
            if self.config.attn_sink:
                # as in transformers' gpt-oss
                init.normal_(module.sinks, mean=0.0, std=self.config.initializer_range)
            if self.config.attn_log_scale:
                init.constant_(module.log_scale, LOG_SCALE_START)


class SoftpickTransformerModel(_Initialized, LlamaModel):
    """Llama's decoder with `NormalizedAttention` in its layers."""

    config_class = SoftpickTransformerConfig
    config: SoftpickTransformerConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in transformers; nothing sets another class

    def __init__(self, config: SoftpickTransformerConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = NormalizedAttention(config, index)
        # once more, for the new modules
        self.post_init()


class SoftpickTransformerForCausalLM(_Initialized, LlamaForCausalLM):
    """Llama with the attention of its configuration."""

    config_class = SoftpickTransformerConfig
    config: SoftpickTransformerConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # narrower than in transformers; nothing sets another class

    def __init__(self, config: SoftpickTransformerConfig) -> None:
        # Llama's own constructor would build Llama's decoder
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SoftpickTransformerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # transformers asks this whenever an implementation is chosen or changed
    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Refuses an implementation that computes another normaliser than ``attn_impl``, or lacks an addition.

        Raises:
            ValueError: The message names the implementation, and what the model needs.
        """
        attn_impl = self.config.attn_impl
        requested = requested_attention or attn_impl
        if normalizer_of(requested) != normalizer_of(attn_impl):
            raise ValueError(
                f"attn_implementation={requested!r} computes {normalizer_of(requested)}, but the model "
                f"was made for attn_impl={attn_impl!r}; to change the function on purpose, pass attn_impl"
            )
        for field in ("attn_sink", "attn_log_scale"):
            # transformers' own implementations take no sinks, and their masks do not tell where a row begins
            if getattr(self.config, field) and requested not in IMPLEMENTATIONS:
                raise ValueError(
                    f"attn_implementation={requested!r} does not go with {field}; take one of "
                    f"{', '.join(IMPLEMENTATIONS)}"
                )
        return super().get_correct_attn_implementation(requested, is_init_check)


def read_config(path: str | Path) -> SoftpickTransformerConfig:
    """Reads a model configuration, and refuses errors that transformers would ignore.

    Args:
        path: JSON file, or a folder with a ``config.json``.

    Raises:
        ValueError: Not a readable JSON object, another ``model_type``, an unknown key, or a shape that
            is invalid; the message is one line with file, key, value and what is expected.
    """
    file = Path(path)
    try:
        if file.is_dir():
            file /= "config.json"
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist; configurations are in configs/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(raw, dict) or raw.get("model_type") != SoftpickTransformerConfig.model_type:
        seen = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(
            f'{file} must have "model_type": "{SoftpickTransformerConfig.model_type}", got {seen!r}'
        )
    known = {option.name for option in fields(SoftpickTransformerConfig)}
    known |= {"model_type", "architectures", "transformers_version", "dtype", "head_dim"}
    if unknown := raw.keys() - known:
        meant = closest(min(unknown), known)
        hint = f"; perhaps you meant {meant!r}" if meant else ""
        raise ValueError(f"{file} has an unknown key {min(unknown)!r}{hint}")
    try:
        config = SoftpickTransformerConfig(**raw)
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    _check_shape(config, file)
    try:
        with torch.device("meta"):
            # a copy, since a model marks its configuration with the operator it runs
            SoftpickTransformerForCausalLM(copy.deepcopy(config))
    except (KeyError, ValueError, AssertionError, RuntimeError) as error:
        # for example a name of an activation, which transformers looks up when it builds the model
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{file}: no model can be built from it: {problem}") from None
    return config


def _check_shape(config: SoftpickTransformerConfig, file: Path) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{file}: {name} must be at least 1, got {value}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:  # pyright: ignore[reportOperatorIssue]  # the configuration has replaced None
        raise ValueError(
            f"{file}: num_attention_heads must be a multiple of num_key_value_heads, "
            f"got {heads} and {kv_heads}"
        )
    if config.head_dim % 2 or config.head_dim > 256:  # pyright: ignore[reportOptionalOperand]  # the configuration has replaced None
        raise ValueError(
            f"{file}: the head dimension must be even (RoPE) and at most 256, got {config.head_dim}"
        )
    if config.rms_norm_eps <= 0:
        raise ValueError(f"{file}: rms_norm_eps must be positive, got {config.rms_norm_eps}")
    if config.attention_dropout:
        raise ValueError(
            f"{file}: attention_dropout must be 0, got {config.attention_dropout}: "
            "the operators have none"
        )
