"""A dump folder belongs to one run: the run's fingerprint, where it is written, and when a folder is refused."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flame.base.errors import UsageError, is_full_disk
from flame.base.files import temporary_name, write_atomically
from flame.base.folder_lock import LOCK_FILE, lock_folder
from flame.base.log import logger
from flame.checkpoints.step_folder import newest_checkpoint, remove
from flame.config.sections import DEFAULT_BOS, JobConfig
from flame.config.upstream_flags import ONLY_VALUES
from flame.data.bos import BEFORE_THE_FLAG
from flame.data.tokenizer import TOKENIZER_KEY
from flame.models import SoftpickTransformerConfig

RUN_FILE = "run.json"
BOS_KEY = "--training.bos"
BATCH_KEY = "the number of sequences in a step (--training.batch_size x ...)"
CONFIG_FILE = "config.toml"

# Flags that may change when a run is continued: they decide how long, how often and where it runs, not what it computes.
_FREE_SECTIONS = (
    "metrics",
    "sample",
    "profiling",
    "comm",
    "memory_estimation",
    "activation_checkpoint",
    "experimental",
)
_FREE_FLAGS = (
    "job.config_file",
    "job.description",
    "job.dump_folder",
    "job.allow_cross_numa",
    "job.print_args",
    "model.config",
    "training.steps",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.compile",
    "training.loss",
    "training.num_workers",
    "training.prefetch_factor",
    # of no effect on a step whose loss and gradients are finite
    "training.skip_nan_inf",
    "training.max_skipped_steps",
    "training.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree",
    "training.fsdp_reshard_after_forward",
    "training.enable_cpu_offload",
    "training.tensor_parallel_degree",
    "training.disable_loss_parallel",
    "training.deterministic",
    "training.gc_freq",
    "validation.freq",
    "checkpoint.interval",
    "checkpoint.keep_latest_k",
    "checkpoint.load_step",
    "checkpoint.async_mode",
    "checkpoint.last_save_model_weights_only",
    "checkpoint.export_dtype",
    "checkpoint.convert_to_hf_on_save",
    "checkpoint.create_seed_checkpoint",
)

# with streaming the checkpoint decides which files may change
_FREE_OF_STREAMS = ("training.data_files",)
# keys that earlier versions wrote and that are compared through the checkpoint today
_COMPARED_BY_STREAMS = ("the files", *(f"--{flag}" for flag in _FREE_OF_STREAMS))

# Flags that took one value, which run.json of earlier versions names.
_FORMER_KEYS = tuple(f"--{flag}" for flag in ONLY_VALUES)

# Keys that older run.json files lack, and the value those runs had; None: unknown.
_LATER_KEYS = {BOS_KEY: BEFORE_THE_FLAG, TOKENIZER_KEY: None}

# glob patterns of what a run writes before its first checkpoint
_LOGS = (
    "metrics*.jsonl*",
    "tb",
    "record",
    "spikes",
    "comm_traces",
    "profile_traces",
    "memory_snapshot",
    "wandb*",
)

# keys that transformers writes and that may differ between its versions; not part of the fingerprint
NOT_SHAPE = ("transformers_version", "architectures", "dtype")
_SHAPE = "--model.config, "


def fingerprint(
    config: JobConfig,
    *,
    model: SoftpickTransformerConfig,
    data: dict[str, Any],
    global_batch_size: int,
) -> dict[str, Any]:
    """Values that must not change when the run is continued, by flag: the content of ``run.json``."""
    free = (*_FREE_FLAGS, *(_FREE_OF_STREAMS if config.training.streaming else ()))
    flags = {
        f"--{flag}": value
        for flag, value in config.flags().items()
        if flag not in free and flag.split(".")[0] not in _FREE_SECTIONS
    }
    shape = {
        f"{_SHAPE}{key}": value
        for key, value in model.to_diff_dict().items()
        if key not in NOT_SHAPE
    }
    return {**flags, BATCH_KEY: global_batch_size, **data, **shape}


def claim_run_folder(config: JobConfig, run: dict[str, Any]) -> IO[bytes]:
    """Reserves the dump folder for this run while the returned file stays open.

    Raises:
        UsageError: The folder is another run's, in use, or cannot be written.
    """
    folder = config.dump_folder
    try:
        require_same_run(folder, run)
        _check_checkpoints(config)
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        # another run may have written while this one waited for the lock
        require_same_run(folder, run)
        _delete_abandoned_run(folder, run)
        # written atomically: this file makes the folder a run's
        write_atomically(folder / RUN_FILE, json.dumps(run, indent=2) + "\n")
        (folder / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--job.dump_folder {folder} must be writable: {error}") from None
    return lock


def require_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Raises UsageError unless ``folder`` is new, is empty, or holds this run or one that saved nothing."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--job.dump_folder {folder} is a file; name a folder")
    file = folder / RUN_FILE
    if not file.is_file():
        # a run that was killed before it wrote its first file leaves these
        if {path.name for path in folder.iterdir()} <= {temporary_name(file).name, LOCK_FILE}:
            return
        raise UsageError(
            f"--job.dump_folder {folder} holds files but no run; name a new or an empty folder"
        )
    earlier = read_run(folder)
    if _saved_nothing(folder, earlier):
        return
    for key in {**earlier, **run}:
        if key not in run and (key in _FORMER_KEYS or key.startswith(_COMPARED_BY_STREAMS)):
            continue
        if key in _LATER_KEYS and key not in earlier:
            earlier[key] = run.get(key) if _LATER_KEYS[key] is None else _LATER_KEYS[key]
        if earlier.get(key) != run.get(key):
            raise UsageError(
                f"--job.dump_folder {folder} holds another run: {key} was {earlier.get(key)!r}, is now "
                f"{run.get(key)!r}; repeat its command to continue it, or name another folder"
            )


def set_bos(config: JobConfig) -> None:
    """Sets ``training.bos``, where no flag does, to that of the run that the dump folder continues.

    Raises:
        UsageError: The folder's ``run.json`` cannot be read.
    """
    if config.training.bos is None:
        folder, bos = config.dump_folder, DEFAULT_BOS
        if (folder / RUN_FILE).is_file():
            earlier = read_run(folder)
            if not _saved_nothing(folder, earlier):
                bos = bos_of(earlier)
        config.training.bos = bos  # pyright: ignore[reportAttributeAccessIssue]  # run.json holds one of the flag's values


def bos_of(run: dict[str, Any]) -> str:
    """The mode of `flame.data.bos` of a run, by its ``run.json``."""
    return run.get(BOS_KEY, BEFORE_THE_FLAG)


def model_of(run: dict[str, Any]) -> SoftpickTransformerConfig:
    """The model of a run, by its ``run.json``."""
    fields = {k.removeprefix(_SHAPE): value for k, value in run.items() if k.startswith(_SHAPE)}
    return SoftpickTransformerConfig(**fields)


def run_of_checkpoint(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint: the nearest parent with a ``run.json``."""
    folders = list(checkpoint.resolve().parents)[:3]
    return next((folder for folder in folders if (folder / RUN_FILE).is_file()), None)


def read_run(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of a run's folder says.

    Raises:
        UsageError: It cannot be read.
    """
    file = folder / RUN_FILE
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--job.dump_folder {folder}: {file} cannot be read: {error}") from None
    if not isinstance(run, dict):
        raise UsageError(f"--job.dump_folder {folder}: {file} is not the file of a run")
    return run


def _saved_nothing(folder: Path, run: dict[str, Any]) -> bool:
    """Whether ``run``, the owner of the folder, ended before its first checkpoint, so that it cannot be continued."""
    # a run without checkpoints leaves its metrics as its result
    if not run.get("--checkpoint.enable_checkpoint") or (folder / "hf").exists():
        return False
    return newest_checkpoint(folder / run["--checkpoint.folder"]) is None


def _delete_abandoned_run(folder: Path, run: dict[str, Any]) -> None:
    """Deletes the files of an earlier, different run that ended without a checkpoint."""
    if not (folder / RUN_FILE).is_file():
        return
    earlier = read_run(folder)
    if earlier == run or not _saved_nothing(folder, earlier):
        return
    patterns = (*_LOGS, earlier["--checkpoint.folder"])
    logs = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    logger.info(
        f"{folder} holds another run, which saved nothing: replacing it, and deleting its "
        f"{', '.join(path.name for path in logs)}"
    )
    for path in logs:
        remove(path)


@contextlib.contextmanager
def explain_full_disk(config: JobConfig) -> Iterator[None]:
    """Turns a full disk into a `UsageError` that says which checkpoint the same command continues from."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        newest = newest_checkpoint(config.dump_folder / config.checkpoint.folder)
        file = f" ({error.filename})" if error.filename else ""
        raise UsageError(
            f"--job.dump_folder {config.dump_folder} cannot be written: {error.strerror}{file}; make room, and the "
            f"same command continues from {newest.name if newest else 'the start'}"
        ) from None


def _check_checkpoints(config: JobConfig) -> None:
    """Raises UsageError if the run would ignore newer checkpoints in its folder."""
    folder, step = config.dump_folder / config.checkpoint.folder, config.checkpoint.load_step
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"--checkpoint.folder {config.checkpoint.folder}: {folder} is a file; move it away"
        )
    newest = newest_checkpoint(folder)
    if newest is not None and not config.checkpoint.enable_checkpoint:
        raise UsageError(
            f"--checkpoint.no_enable_checkpoint: {folder} has checkpoints of this run, which it would "
            "neither continue nor replace; name another --job.dump_folder"
        )
    if step != -1 and (newest is None or newest.name != f"step-{step}"):
        raise UsageError(
            f"--checkpoint.load_step {step} must be the newest complete checkpoint in {folder}, which is "
            f"{newest.name if newest else 'none'}; to go back, copy the folder and delete newer ones"
        )
