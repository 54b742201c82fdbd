"""The model of a run's checkpoint as a Hugging Face folder, with its tokenizer and a model card."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from flame.checkpoints.huggingface import dcp_to_hf, num_parameters
from flame.config.sections import DEFAULT_BOS
from flame.models import SoftpickTransformerConfig
from flame.run.model_card import model_card


def export_model(
    checkpoint: Path,
    *,
    config: SoftpickTransformerConfig,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    bos: str = DEFAULT_BOS,
    run: Path | None = None,
    **options: Any,
) -> None:
    """Writes a checkpoint as a Hugging Face folder (`dcp_to_hf`), with the model card of its run.

    Args:
        checkpoint: Folder ``step-N``.
        config: Configuration of the model.
        tokenizer: Tokenizer of the run.
        out: Folder to write.
        bos: Mode of `flame.data.bos` that the model was trained in.
        run: Folder of the run that saved the checkpoint; None if it is not known.
        options: The other arguments of `dcp_to_hf`.

    Raises:
        UsageError: The checkpoint has other weights than the configuration asks for.
    """
    card = model_card(
        config,
        tokenizer,
        bos=bos,
        parameters=num_parameters(config),
        checkpoint=checkpoint,
        folder=out,
        run=run,
    )
    dcp_to_hf(
        checkpoint, config=config, tokenizer=tokenizer, out=out, bos=bos, card=card, **options
    )
