"""``python -m flame.convert``: converts between checkpoints of a run and Hugging Face folders, on a CPU."""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, PreTrainedTokenizerFast

from flame.base.command_line import Parser
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.log import init_logger, logger
from flame.base.paths import path_argument, text_argument
from flame.checkpoints.huggingface import DTYPES, MAX_SHARD_SIZE, hf_to_dcp
from flame.checkpoints.step_folder import (
    describe_failure,
    is_complete,
)
from flame.config.sections import DEFAULT_BOS
from flame.data.bos import MODES
from flame.data.tokenizer import BYTE, TOKENIZER_KEY, load_tokenizer, tokenizer_sha256
from flame.models import SoftpickTransformerConfig, read_config
from flame.run.export import export_model
from flame.run.fingerprint import NOT_SHAPE, RUN_FILE, bos_of, model_of, read_run, run_of_checkpoint

# configuration that changes what a Llama's weights compute, in addition to their shapes
_MEANING = (
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)


def _config_of(folder: Path, target: str | None) -> SoftpickTransformerConfig:
    """The model configuration of a Hugging Face folder.

    Args:
        folder: Folder with a ``config.json``, of a softpick_transformer or a Llama.
        target: Model configuration to train, which a Llama needs: it names no operator.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--model {folder} has no usable config.json: {error}") from None
    if model_type not in ("llama", SoftpickTransformerConfig.model_type):
        raise UsageError(
            f"--model {folder} must be a softpick_transformer or a llama, got {model_type!r}"
        )
    if target is None:
        if model_type == "llama":
            raise UsageError(
                f"--model {folder} is a Llama, which names no attn_impl: add --model.config, the model "
                "JSON to train it with"
            )
        return _read_config(str(folder), "--model")
    config = _read_config(target, "--model.config")
    try:
        source = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--model {folder} cannot be read: {' '.join(str(error).split())}"
        ) from None
    for key in _MEANING:
        if getattr(source, key) != getattr(config, key):
            raise UsageError(
                f"--model {folder} does not fit --model.config {target}: {key} must be {getattr(config, key)!r}, "
                f"got {getattr(source, key)!r}"
            )
    return config


def _read_config(path: str, flag: str) -> SoftpickTransformerConfig:
    try:
        return read_config(path)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def _require_new(out: Path) -> None:
    if out.name in ("", ".."):
        raise UsageError(f"--out must be the name of a new folder, got {str(out)!r}")
    if os.path.lexists(out):
        raise UsageError(f"--out {out} exists already; name a new folder")


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m flame.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("dcp-to-hf", help="checkpoint of a run -> Hugging Face folder")
    export.add_argument(
        "--checkpoint", type=path_argument, required=True, help="folder step-N of a run"
    )
    export.add_argument(
        "--model.config",
        dest="config",
        type=text_argument,
        help="model JSON of the run (default: by its run.json)",
    )
    export.add_argument(
        "--model.tokenizer_path",
        dest="tokenizer",
        type=text_argument,
        help="tokenizer of the run (default: by its run.json, else byte)",
    )
    export.add_argument(
        "--training.bos",
        "--bos",
        dest="bos",
        choices=MODES,
        help=f"how its documents began (default: by its run.json, else {DEFAULT_BOS})",
    )
    export.add_argument(
        "--out", type=path_argument, required=True, help="folder to write, a new one"
    )
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    export.add_argument(
        "--max_shard_size",
        type=_size,
        default=MAX_SHARD_SIZE,
        help="largest file of weights (default: %(default)s)",
    )
    start = commands.add_parser(
        "hf-to-dcp",
        help="Hugging Face folder -> checkpoint for --checkpoint.initial_load_path",
    )
    start.add_argument(
        "--model",
        type=path_argument,
        required=True,
        help="folder of a softpick_transformer or a LlamaForCausalLM, with safetensors",
    )
    start.add_argument(
        "--model.config",
        dest="config",
        type=text_argument,
        help="model JSON to train with; a Llama needs it (default: the folder's own)",
    )
    start.add_argument(
        "--out", type=path_argument, required=True, help="folder to write, a new one"
    )
    return parser


def main() -> None:
    """Runs the command of the first argument."""
    init_logger()
    with exit_on_usage_error():
        args = _parser().parse_args()
        _require_new(args.out)
        try:
            if args.command == "dcp-to-hf":
                _dcp_to_hf_command(args)
            else:
                config = _config_of(args.model, args.config)
                hf_to_dcp(args.model, config=config, out=args.out)
        except OSError as error:
            raise UsageError(f"--out {args.out} cannot be written: {error}") from None
        except CheckpointException as error:
            what = (
                f"--checkpoint {args.checkpoint}" if "checkpoint" in args else f"--out {args.out}"
            )
            raise UsageError(f"{what}: {describe_failure(error)}") from None
    logger.info(f"written to {args.out}")


def _dcp_to_hf_command(args: argparse.Namespace) -> None:
    if not is_complete(args.checkpoint):
        raise UsageError(f"--checkpoint {args.checkpoint} is not a complete checkpoint step-N")
    folder = run_of_checkpoint(args.checkpoint)
    run = read_run(folder) if folder is not None else None
    if run is None:
        if args.config is None:
            raise UsageError(
                f"--model.config is needed: no {RUN_FILE} above --checkpoint {args.checkpoint} says what it is"
            )
        args.tokenizer, args.bos = args.tokenizer or BYTE, args.bos or DEFAULT_BOS
        logger.info(
            f"no {RUN_FILE} above {args.checkpoint}: --model.tokenizer_path {args.tokenizer} --training.bos {args.bos}"
        )
    export_model(
        args.checkpoint,
        config=_model_for(args, run),
        tokenizer=_tokenizer_for(args, run),
        bos=_bos_for(args, run),
        run=folder,
        out=args.out,
        dtype=getattr(torch, args.dtype),
        max_shard_size=args.max_shard_size,
    )


def _model_for(args: argparse.Namespace, run: dict[str, Any] | None) -> SoftpickTransformerConfig:
    given = None if args.config is None else _read_config(args.config, "--model.config")
    if run is None:
        return given  # pyright: ignore[reportReturnType]  # --model.config is required if there is no run
    trained = model_of(run)
    if given is not None:
        here, there = given.to_dict(), trained.to_dict()
        for key in sorted((here.keys() | there.keys()) - set(NOT_SHAPE)):
            if here.get(key) != there.get(key):
                raise _contradiction(
                    args, f"--model.config {args.config}", key, here.get(key), there.get(key)
                )
    return trained


def _tokenizer_for(args: argparse.Namespace, run: dict[str, Any] | None) -> PreTrainedTokenizerFast:
    name = args.tokenizer or run["--model.tokenizer_path"]  # pyright: ignore[reportOptionalSubscript]  # args.tokenizer is set if there is no run
    try:
        tokenizer = load_tokenizer(name)
        if run is not None:
            trained = run.get(TOKENIZER_KEY)
            if trained is None and args.tokenizer is not None:
                # a run of an earlier version recorded no sha256
                trained = tokenizer_sha256(load_tokenizer(run["--model.tokenizer_path"]))
            here = tokenizer_sha256(tokenizer)
            if trained not in (None, here):
                raise _contradiction(
                    args, f"--model.tokenizer_path {name}", "its sha256", here, trained
                )
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from None
    return tokenizer


def _bos_for(args: argparse.Namespace, run: dict[str, Any] | None) -> str:
    if run is None:
        return args.bos
    if args.bos not in (None, bos_of(run)):
        raise _contradiction(args, "--training.bos", "the mode", args.bos, bos_of(run))
    return bos_of(run)


def _contradiction(
    args: argparse.Namespace, flag: str, field: str, here: object, there: object
) -> UsageError:
    return UsageError(
        f"{flag}: {field} is {here!r}, but --checkpoint {args.checkpoint} was trained with {there!r}; leave the flag "
        "out to take what its run says"
    )


if __name__ == "__main__":
    raise_at_interrupt()
    main()
