"""Between checkpoints of a run and Hugging Face folders, on a CPU and without a process group."""

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, PreTrainedTokenizerFast

from flame.checkpoint_folder import (
    AtomicWriter,
    describe_failure,
    fsync,
    is_complete,
    no_process_group,
    read_contents,
    remove,
)
from flame.cli import Parser
from flame.config import DEFAULT_BOS
from flame.data import load_tokenizer
from flame.data.bos import MODES, save_for_inference
from flame.data.tokenizer import BYTE, IDENTITY_KEY, tokenizer_sha256
from flame.errors import UsageError, exit_on_usage_error
from flame.files import apply_umask
from flame.log import init_logger, logger
from flame.model_card import model_card
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM, read_config
from flame.paths import path_argument, text_argument
from flame.run_folder import NOT_SHAPE, RUN_FILE, bos_of, model_of, read_run, run_of_checkpoint

DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_SIZE = "2GB"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# what the weights of a Llama mean, besides their shapes
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


def check_weights(
    contents: dict[str, torch.Size | None],
    config: SoftpickTransformerConfig,
    *,
    what: str,
    wanted: str,
) -> None:
    """Raises UsageError unless ``contents`` has every weight of the model, in its shape.

    Args:
        contents: Name -> shape of what there is.
        config: The model.
        what: What ``contents`` was read from, for the message.
        wanted: What ``config`` was read from, for the message.
    """
    for name, tensor in _meta_model(config).state_dict().items():
        if name not in contents:
            raise UsageError(f"{what} is not of {wanted}: it has no {name}")
        if contents[name] != tensor.shape:
            raise UsageError(
                f"{what} is not of {wanted}: {name} is {list(contents[name] or [])}, the model's is "
                f"{list(tensor.shape)}"
            )


def dcp_to_hf(
    checkpoint: Path,
    *,
    config: SoftpickTransformerConfig,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    bos: str = DEFAULT_BOS,
    run: Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes the model of a checkpoint with its tokenizer and a model card, one file of weights after the other.

    The folder appears under its name when it is whole, and replaces one that is there. The weights of two
    files at most are in memory.

    Args:
        checkpoint: Folder ``step-N``.
        config: Configuration the model was trained with.
        tokenizer: Tokenizer it was trained with; names the special tokens of the export.
        bos: Mode of `flame.data.bos` it was trained in: the exported tokenizer begins a text as training did.
        run: Folder of its run, for the model card.
        out: Folder for ``AutoModelForCausalLM.from_pretrained``.
        dtype: Floating-point type of the weights.
        max_shard_size: Largest file of weights, such as ``"2GB"`` (10^9 bytes each).

    Raises:
        UsageError: The checkpoint has other weights than the configuration asks for.
    """
    check_weights(
        read_contents(checkpoint), config, what=f"checkpoint {checkpoint}", wanted="the model"
    )
    model = _meta_model(config)
    for x in (model.config, model.generation_config):
        x.bos_token_id = tokenizer.bos_token_id
        x.eos_token_id = tokenizer.eos_token_id
        x.pad_token_id = tokenizer.pad_token_id
    # transformers would sample from the 50 likeliest tokens alone, and writes these only with do_sample
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    weights = {name: x.to(dtype) for name, x in model.state_dict().items()}
    for name, origin in _tied(config).items():
        # the files have them once
        if not torch.equal(*_load(checkpoint, {x: weights[x] for x in (name, origin)}).values()):
            raise UsageError(
                f"checkpoint {checkpoint} has tied weights {name} that differ from {origin}"
            )
        del weights[name]
    with _temporary(out) as temporary:
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_for_inference(tokenizer, bos, temporary)
        parameters = sum(x.numel() for x in weights.values())
        card = model_card(
            config,
            tokenizer,
            bos=bos,
            parameters=parameters,
            checkpoint=checkpoint,
            folder=out,
            run=run,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        shards = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
        for file, names in shards.filename_to_tensors.items():
            tensors = _load(checkpoint, {name: weights[name] for name in names})
            save_file(tensors, temporary / file, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (temporary / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _publish(temporary, out)


def hf_to_dcp(model: Path, *, config: SoftpickTransformerConfig, out: Path) -> None:
    """Writes the weights of a Hugging Face folder as a checkpoint that a run can start from.

    They keep their dtype; the run reads them into its own. Files are mapped and not read whole.

    Args:
        model: Folder with ``model.safetensors``, or its index and files.
        config: Configuration of the model that the run will train.
        out: Folder to write, for ``--checkpoint.initial_load_path``; must not be there.

    Raises:
        UsageError: Files are missing or damaged, or the weights are not those of ``config``.
    """
    weights = _read_safetensors(model)
    for name, origin in _tied(config).items():
        if origin in weights:
            weights.setdefault(name, weights[origin])
    # Llamas of old carry a buffer that is computed now
    weights = {name: x for name, x in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    what = f"--model {model}"
    check_weights(
        {name: x.shape for name, x in weights.items()}, config, what=what, wanted="the model"
    )
    if unknown := weights.keys() - _meta_model(config).state_dict().keys():
        raise UsageError(f"{what} is not of the model: {min(unknown)} has no place in it")
    with no_process_group():
        dcp.save(weights, storage_writer=AtomicWriter(out), no_dist=True)


def _meta_model(config: SoftpickTransformerConfig) -> SoftpickTransformerForCausalLM:
    with torch.device("meta"):
        # a copy, since a model marks its configuration with the operator it runs
        return SoftpickTransformerForCausalLM(copy.deepcopy(config))


def _tied(config: SoftpickTransformerConfig) -> dict[str, str]:
    """Name -> name of the weight that it shares."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def _load(checkpoint: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of that name, in the dtype of ``wanted``, which may be on the meta device."""
    tensors = {name: torch.empty_like(x, device="cpu") for name, x in wanted.items()}
    with no_process_group():
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)
    return tensors


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out``, which is gone if what follows fails."""
    temporary = out.with_name(out.name + ".saving")
    if os.path.lexists(temporary):
        # of an export that was killed
        remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, out: Path) -> None:
    """Gives a finished folder its name, in the place of one that has it."""
    for path in (*temporary.iterdir(), temporary):
        # safetensors writes for the owner alone
        apply_umask(path)
        fsync(path)
    old = out.with_name(out.name + ".deleting")
    if os.path.lexists(old):
        remove(old)
    if os.path.lexists(out):
        out.rename(old)
    temporary.rename(out)
    fsync(out.parent)
    if os.path.lexists(old):
        remove(old)


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, mapped from the files."""
    try:
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        elif (folder / _WEIGHTS).is_file():
            files = [_WEIGHTS]
        else:
            raise UsageError(
                f"--model {folder} has no {_WEIGHTS} and no {_INDEX}; other formats are not read: save "
                "the model with transformers' save_pretrained first"
            )
        weights: dict[str, torch.Tensor] = {}
        for name in files:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"--model {folder} cannot be read: {type(error).__name__}: {error}"
        ) from None
    return weights


def _config_of(folder: Path, target: str | None) -> SoftpickTransformerConfig:
    """The model that a Hugging Face folder's weights are for.

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
                f"--model {folder} is not of --model.config {target}: {key} is {getattr(source, key)!r} "
                f"there, {getattr(config, key)!r} here"
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
        raise UsageError(f"--out {out} is there already; name a new folder")


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
    dcp_to_hf(
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
        return given
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
    name = args.tokenizer or run["--model.tokenizer_path"]
    try:
        tokenizer = load_tokenizer(name)
        if run is not None:
            trained = run.get(IDENTITY_KEY)
            if trained is None and args.tokenizer is not None:
                # of before the fingerprint
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
    main()
