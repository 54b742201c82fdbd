"""The dump folder belongs to one run: what makes a run, where that is written, and when it is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from flame.config import JobConfig
from flame.convert import is_complete
from flame.data import checksum
from flame.errors import UsageError
from flame.models import SoftpickTransformerConfig

RUN_FILE = "run.json"
CONFIG_FILE = "config.toml"
_TEMPORARY = f"{RUN_FILE}.tmp"

# Flags that may change when a run is continued: they alter how far, how often and where, not what.
_FREE_SECTIONS = ("metrics", "sample")
_FREE_FLAGS = (
    "job.config_file",
    "job.dump_folder",
    "model.config",
    "training.steps",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.compile",
    "training.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree",
    "validation.freq",
    "checkpoint.enable_checkpoint",
    "checkpoint.interval",
    "checkpoint.keep_latest_k",
    "checkpoint.load_step",
)


# what transformers adds to a configuration and an upgrade may change
_NOT_SHAPE = ("transformers_version", "architectures", "dtype")


def identity(
    config: JobConfig,
    *,
    model: SoftpickTransformerConfig,
    train_tokens: np.ndarray,
    global_batch_size: int,
) -> dict[str, Any]:
    """What must stay the same for a run to be continued, by flag."""
    flags = {
        f"--{flag}": value
        for flag, value in config.flags().items()
        if flag not in _FREE_FLAGS and flag.split(".")[0] not in _FREE_SECTIONS
    }
    return {
        **flags,
        "the number of sequences in a step (--training.batch_size x ...)": global_batch_size,
        "the number of tokens (--training.dataset)": len(train_tokens),
        "the checksum of the tokens (--training.dataset)": checksum(train_tokens),
        **{
            f"--model.config, {key}": value
            for key, value in model.to_diff_dict().items()
            if key not in _NOT_SHAPE
        },
    }


def check_run_folder(folder: Path, run: dict[str, Any]) -> None:
    """Raises UsageError unless ``folder`` is new, empty, or holds this very run."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--job.dump_folder {folder} is a file; name a folder")
    file = folder / RUN_FILE
    if not file.is_file():
        # a run that was killed while it wrote its first file leaves that
        if {path.name for path in folder.iterdir()} <= {_TEMPORARY}:
            return
        raise UsageError(
            f"--job.dump_folder {folder} holds files that are no run's; name a new or an empty folder"
        )
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--job.dump_folder {folder}: {file} cannot be read: {error}") from None
    for key in {**earlier, **run}:
        if earlier.get(key) != run.get(key):
            raise UsageError(
                f"--job.dump_folder {folder} holds another run: {key} was {earlier.get(key)!r}, is now "
                f"{run.get(key)!r}; repeat its command to continue it, or name another folder"
            )


def check_load_step(config: JobConfig) -> None:
    """Raises UsageError if the checkpoint that ``--checkpoint.load_step`` names is not there."""
    step, folder = config.checkpoint.load_step, config.dump_folder / config.checkpoint.folder
    if step != -1 and not is_complete(folder / f"step-{step}"):
        there = sorted(path.name for path in folder.glob("step-*") if is_complete(path))
        raise UsageError(
            f"--checkpoint.load_step {step}: {folder} has no complete step-{step}; there are: "
            + (", ".join(there) or "none")
        )


def write_run_folder(folder: Path, config: JobConfig, run: dict[str, Any]) -> None:
    """Makes the folder this run's; raises UsageError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # in one move: with this file the folder counts as a run's
        (folder / _TEMPORARY).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        (folder / _TEMPORARY).replace(folder / RUN_FILE)
        (folder / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--job.dump_folder {folder} must be writable: {error}") from None
