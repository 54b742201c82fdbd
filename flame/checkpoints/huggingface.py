"""Converts weights between checkpoints and Hugging Face folders, on a CPU and without a process group."""

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from flame.base.errors import UsageError
from flame.base.files import apply_umask
from flame.checkpoints.step_folder import (
    AtomicWriter,
    fsync,
    no_process_group,
    read_contents,
    remove,
)
from flame.config.sections import DEFAULT_BOS
from flame.data.bos import save_for_inference
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM

DTYPES = ("float32", "bfloat16", "float16")
MAX_SHARD_SIZE = "2GB"

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_weights(
    contents: dict[str, torch.Size | None],
    config: SoftpickTransformerConfig,
    *,
    what: str,
    wanted: str,
) -> None:
    """Raises UsageError unless ``contents`` has every weight of the model, in its shape.

    Args:
        contents: Name -> shape of the weights that exist.
        config: The model.
        what: What ``contents`` was read from, for the message.
        wanted: What ``config`` was read from, for the message.
    """
    for name, tensor in _meta_model(config).state_dict().items():
        if name not in contents:
            raise UsageError(f"{what} does not fit {wanted}: it has no {name}")
        if contents[name] != tensor.shape:
            raise UsageError(
                f"{what} does not fit {wanted}: {name} must have the shape {list(tensor.shape)}, got "
                f"{list(contents[name] or [])}"
            )


def dcp_to_hf(
    checkpoint: Path,
    *,
    config: SoftpickTransformerConfig,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    bos: str = DEFAULT_BOS,
    card: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Writes the model of a checkpoint with its tokenizer, one file of weights after the other.

    The folder gets its name when it is complete, and replaces an existing one. At most the weights of two files are
    in memory.

    Args:
        checkpoint: Folder ``step-N``.
        config: Configuration the model was trained with.
        tokenizer: Tokenizer it was trained with; names the special tokens of the export.
        bos: Mode of `flame.data.bos` it was trained in: the exported tokenizer begins a text as training did.
        card: Text of the model card, ``README.md``.
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
        x.bos_token_id = tokenizer.bos_token_id  # pyright: ignore[reportAttributeAccessIssue]  # transformers types the ids of all special tokens alike; this one is an int or None
        x.eos_token_id = tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]  # transformers types the ids of all special tokens alike; this one is an int or None
        x.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]  # transformers types the ids of all special tokens alike; this one is an int or None
    # transformers would sample from only the 50 likeliest tokens; it saves these values only with do_sample
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    weights = {name: x.to(dtype) for name, x in model.state_dict().items()}
    for name, origin in _tied(config).items():
        # the files hold tied weights once
        if not torch.equal(*_load(checkpoint, {x: weights[x] for x in (name, origin)}).values()):
            raise UsageError(
                f"checkpoint {checkpoint} has tied weights {name} that differ from {origin}"
            )
        del weights[name]
    with _temporary(out) as temporary:
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_for_inference(tokenizer, bos, temporary)
        if card is not None:
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

    Weights keep their dtype; the run converts them when it loads them. Files are memory-mapped.

    Args:
        model: Folder with ``model.safetensors``, or its index and files.
        config: Configuration of the model that the run will train.
        out: Folder to write, for ``--checkpoint.initial_load_path``; must not exist.

    Raises:
        UsageError: Files are missing or damaged, or the weights are not those of ``config``.
    """
    weights = _read_safetensors(model)
    for name, origin in _tied(config).items():
        if origin in weights:
            weights.setdefault(name, weights[origin])
    # old Llama exports hold a buffer that transformers computes today
    weights = {name: x for name, x in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    what = f"--model {model}"
    check_weights(
        {name: x.shape for name, x in weights.items()}, config, what=what, wanted="the model"
    )
    if unknown := weights.keys() - _meta_model(config).state_dict().keys():
        raise UsageError(f"{what} does not fit the model, which has no parameter {min(unknown)}")
    with no_process_group():
        dcp.save(weights, storage_writer=AtomicWriter(out), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it


def _meta_model(config: SoftpickTransformerConfig) -> SoftpickTransformerForCausalLM:
    with torch.device("meta"):
        # a copy, since a model marks its configuration with the operator it runs
        return SoftpickTransformerForCausalLM(copy.deepcopy(config))


def num_parameters(config: SoftpickTransformerConfig) -> int:
    """Number of the model's weights, a tied one counted once."""
    return sum(p.numel() for p in _meta_model(config).parameters())


def _tied(config: SoftpickTransformerConfig) -> dict[str, str]:
    """Name -> name of the weight that it shares."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def _load(checkpoint: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights named in ``wanted``, in its dtypes; the tensors of ``wanted`` may be on the meta device."""
    tensors = {name: torch.empty_like(x, device="cpu") for name, x in wanted.items()}
    with no_process_group():
        dcp.load(tensors, checkpoint_id=str(checkpoint), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it
    return tensors


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """An empty folder next to ``out``, deleted if the block fails."""
    temporary = out.with_name(out.name + ".saving")
    if os.path.lexists(temporary):
        # left by an export that was killed
        remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, out: Path) -> None:
    """Renames a finished folder, and replaces an existing one of that name."""
    for path in (*temporary.iterdir(), temporary):
        # safetensors gives access to the owner only
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
