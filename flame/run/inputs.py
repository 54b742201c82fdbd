"""Reads model, tokenizer and data before a run starts, and checks them against the flags and this machine."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from flame.base.errors import UsageError
from flame.config.sections import JobConfig
from flame.data.run_data import RunData, open_data
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerConfig, read_config, require_device
from flame.models.linear_loss import linear_loss
from flame.run.check_layout import check_layout
from flame.run.metrics_file import require_wandb
from flame.titan.config import world_size
from flame.titan.patches import DEVICE_TYPE


@dataclass(kw_only=True, slots=True)
class RunInputs:
    """What a run reads before it starts."""

    tokenizer: PreTrainedTokenizerFast
    data: RunData
    model: SoftpickTransformerConfig


def read_model(config: JobConfig, num_processes: int) -> SoftpickTransformerConfig:
    """The model of a run of ``num_processes``.

    Raises:
        UsageError: The model, the flags or this machine do not fit together.
    """
    try:
        model = read_config(config.model.config)
    except ValueError as error:
        raise UsageError(f"--model.config: {error}") from None
    require_device(model.attn_impl, DEVICE_TYPE)
    # raises if this machine cannot compute the loss
    linear_loss(config.training.loss, DEVICE_TYPE)
    if config.metrics.enable_wandb:
        require_wandb()
    if config.profiling.enable_memory_snapshot and DEVICE_TYPE == "cpu":
        raise UsageError(
            "--profiling.enable_memory_snapshot records a GPU's allocator, and this machine has none"
        )
    t = config.training
    check_layout(config, model, num_processes=num_processes, device_type=DEVICE_TYPE)
    if t.seq_len > model.max_position_embeddings:
        raise UsageError(
            f"--training.seq_len {t.seq_len} must be at most max_position_embeddings "
            f"{model.max_position_embeddings} of --model.config {config.model.config}"
        )
    if t.varlen and t.compile and model.attn_impl.startswith("naive_"):
        raise UsageError(
            f'--training.varlen with --training.compile needs a Triton attn_impl, got "{model.attn_impl}", '
            "which reads cu_seqlens on the host; leave out --training.compile"
        )
    return model


def read_tokenizer(config: JobConfig, model: SoftpickTransformerConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the run.

    Raises:
        UsageError: It cannot be read, or it has more ids than the model's vocabulary.
    """
    try:
        tokenizer = load_tokenizer(config.model.tokenizer_path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # the largest id and not the count: vocabularies may have gaps
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if num_ids > model.vocab_size:
        raise UsageError(
            f"--model.tokenizer_path {config.model.tokenizer_path} has {num_ids} tokens, more than "
            f"vocab_size {model.vocab_size} of --model.config {config.model.config}"
        )
    return tokenizer


def read_inputs(config: JobConfig) -> RunInputs:
    """Reads and checks everything the run needs.

    Raises:
        UsageError: A flag or file that the user must correct.
    """
    model = read_model(config, world_size())
    tokenizer = read_tokenizer(config, model)
    try:
        data = open_data(config, tokenizer)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return RunInputs(tokenizer=tokenizer, data=data, model=model)


def set_precision(config: JobConfig) -> None:
    """Sets ``training.mixed_precision_param`` to the default of this machine if no flag sets it."""
    if config.training.mixed_precision_param is None:
        config.training.mixed_precision_param = "float32" if DEVICE_TYPE == "cpu" else "bfloat16"
