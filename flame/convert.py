"""``python -m flame.convert dcp-to-hf``: a checkpoint of a run as a Hugging Face model folder."""

import argparse
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerFast

from flame.data import load_tokenizer
from flame.errors import UsageError, exit_on_usage_error
from flame.log import init_logger, logger
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM, read_config


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder ``step-N`` was saved to the end; torch writes the metadata last."""
    return (checkpoint / ".metadata").is_file()


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint ``step-N`` with the largest ``N``."""
    steps = [
        path
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and is_complete(path)
    ]
    return max(steps, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def dcp_to_hf(
    checkpoint: Path,
    config: SoftpickTransformerConfig,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
) -> None:
    """Writes the model of a distributed checkpoint, float32, with its tokenizer.

    Args:
        checkpoint: Folder ``step-N``.
        config: Configuration the model was trained with.
        tokenizer: Tokenizer it was trained with; names the special tokens of the export.
        out: Folder for ``AutoModelForCausalLM.from_pretrained``.
    """
    model = SoftpickTransformerForCausalLM(config)
    state = model.state_dict()
    # every weight comes from the checkpoint: one that is missing there fails here
    with warnings.catch_warnings():
        # it warns that it takes no_dist=True at its word
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    model.load_state_dict(state)
    for x in (model.config, model.generation_config):
        x.bos_token_id = tokenizer.bos_token_id
        x.eos_token_id = tokenizer.eos_token_id
        x.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float32).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flame.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("dcp-to-hf", help="checkpoint of a run -> Hugging Face folder")
    export.add_argument("--checkpoint", type=Path, required=True, help="folder step-N of a run")
    export.add_argument("--model.config", dest="config", required=True, help="model JSON")
    export.add_argument("--model.tokenizer_path", dest="tokenizer", default="byte")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    init_logger()
    with exit_on_usage_error():
        if not is_complete(args.checkpoint):
            raise UsageError(f"--checkpoint {args.checkpoint} is not a complete checkpoint step-N")
        try:
            config, tokenizer = read_config(args.config), load_tokenizer(args.tokenizer)
        except ValueError as error:
            raise UsageError(str(error)) from None
        try:
            dcp_to_hf(args.checkpoint, config, tokenizer, args.out)
        except CheckpointException as error:
            problem = " ".join(str(error).split())[-200:]
            raise UsageError(
                f"--checkpoint {args.checkpoint} is not of --model.config {args.config}: {problem}"
            ) from None
    logger.info(f"model {args.out}")


if __name__ == "__main__":
    main()
