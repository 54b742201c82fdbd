"""Loads models from folders, and refuses a model whose weights are not complete."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from flame.base.errors import UsageError

READING_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)
"""What transformers, tokenizers and safetensors raise at files that are missing or damaged."""


def load_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a Hugging Face folder; ``options`` are those of ``from_pretrained``.

    transformers itself draws missing weights at random and ignores weights that the model does not know.

    Raises:
        UsageError: A weight is missing, has another shape, is unknown to the model, or is not finite.
        READING_ERRORS: The files cannot be read.
    """
    model, found = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # with output_loading_info the result is a pair
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for key, what in (
        ("mismatched_keys", "has another shape than config.json says"),
        ("missing_keys", "is missing from its weights"),
        ("unexpected_keys", "is in its weights, but no part of the model of config.json"),
    ):
        # a mismatched key comes with its shapes
        names = sorted(x if isinstance(x, str) else x[0] for x in found[key])
        if names:
            more = f" (and {len(names) - 1} more)" if names[1:] else ""
            raise UsageError(f"the model in {folder} is not whole: {names[0]} {what}{more}")
    for name, x in model.named_parameters():
        if not x.isfinite().all():
            raise UsageError(f"the model in {folder} cannot be used: {name} is not finite")
    return model


def unreadable(folder: str | Path, error: Exception) -> UsageError:
    """One of `READING_ERRORS` on one line."""
    return UsageError(
        f"--model {folder} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
    )
