"""The checkpoints of a run on disk: writing atomically, finding, reading metadata, deleting.

A folder ``step-N`` is a complete checkpoint: it is written as ``step-N.saving`` and renamed when everything
in it has reached the disk. A checkpoint that is being deleted is called ``step-N.deleting``. A kill leaves both
kinds behind; the next run removes them.
"""

import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flame.base.errors import UsageError
from flame.base.log import logger

_SAVING, _DELETING = ".saving", ".deleting"


def step_of(path: Path) -> int:
    """``N`` of a folder ``step-N``; -1 for any other name."""
    number = path.name.removeprefix("step-")
    return int(number) if path.name.startswith("step-") and number.isdecimal() else -1


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder was saved to the end; torch writes the metadata last."""
    return (checkpoint / ".metadata").is_file()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints ``step-N``, oldest first."""
    steps = [path for path in folder.glob("step-*") if step_of(path) >= 0 and is_complete(path)]
    return sorted(steps, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint ``step-N`` with the largest ``N``."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove(path: Path) -> None:
    """Deletes a folder, a file, or a link (not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written or half deleted; no run may be saving there.

    Raises:
        UsageError: Something cannot be deleted.
    """
    for path in folder.glob("step-*"):
        is_half = path.suffix in (_SAVING, _DELETING) and step_of(path.with_suffix("")) >= 0
        if is_half or (step_of(path) >= 0 and not is_complete(path)):
            logger.info(f"removing {path}, which a killed run left incomplete")
            try:
                remove(path)
            except OSError as error:
                raise UsageError(
                    f"{path}, which a killed run left incomplete, cannot be deleted: {error}"
                ) from None


def remove_unfinished(folder: Path, step: int) -> None:
    """Removes what a failed save of ``step`` has written."""
    shutil.rmtree(folder / f"step-{step}{_SAVING}", ignore_errors=True)


def purge(folder: Path, keep: int) -> None:
    """Deletes the oldest complete checkpoints until ``keep`` are left; 0 keeps all."""
    for path in complete_checkpoints(folder)[:-keep] if keep else []:
        doomed = path.with_name(path.name + _DELETING)
        try:
            # renamed first, so that a half deleted folder does not count as a checkpoint
            path.rename(doomed)
            remove(doomed)
        except OSError as error:
            # another process may be reading it; the run does not need the deletion, and the next purge tries again
            logger.warning(f"{path} could not be deleted: {error}")


def fsync(path: Path) -> None:
    """Sends a file's content, or a folder's entries, to the disk, so that a power loss keeps them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AtomicWriter(FileSystemWriter):
    """Writes a distributed checkpoint that gets its name when it is complete and on the disk.

    Args:
        path: The checkpoint's folder. It must not be a complete checkpoint already.
        staged: Whether the tensors are on the CPU already.
        then: Called with ``path`` on the coordinating rank when the checkpoint is complete.
    """

    def __init__(
        self, path: Path, *, staged: bool = True, then: Callable[[Path], None] | None = None
    ) -> None:
        # copying ahead helps only for tensors on a GPU; for others torch would start a stream needlessly
        ahead = {"per_thread_copy_ahead": 0} if staged else {}
        super().__init__(path.with_name(path.name + _SAVING), **ahead)  # pyright: ignore[reportArgumentType]  # the dict holds per_thread_copy_ahead only
        self.final = path
        self.then = then

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file.

        Raises:
            OSError: The write failed. torch's zip writer raises RuntimeError on a full disk; it is replaced by the
                OSError that caused it.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Renames the folder; runs on the coordinating rank, after all ranks have written and synced their files.

        Raises:
            FileExistsError: There is a complete checkpoint of that name.
        """
        super().finish(metadata, results)
        fsync(self.path)  # pyright: ignore[reportArgumentType]  # __init__ was given a Path, not a str
        if self.final.exists():
            if is_complete(self.final):
                raise FileExistsError(f"{self.final} is a complete checkpoint already")
            remove(self.final)
        self.path.rename(self.final)  # pyright: ignore[reportAttributeAccessIssue]  # __init__ was given a Path, not a str
        fsync(self.final.parent)
        if self.then is not None:
            self.then(self.final)


def read_contents(checkpoint: Path) -> dict[str, torch.Size | None]:
    """Name -> shape of everything in a complete checkpoint; None for what is not a tensor.

    Raises:
        UsageError: The metadata cannot be read.
    """
    try:
        entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    # what unpickling damaged bytes raises
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        ImportError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise UsageError(
            f"checkpoint {checkpoint} is damaged: its .metadata cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); delete the folder, or copy it again"
        ) from None
    return {
        name: entry.size if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in entries.items()
    }


def has_weights_only(contents: dict[str, torch.Size | None]) -> bool:
    """Whether a checkpoint holds a model to start from but no run to continue."""
    return "train_state.step" not in contents


@contextlib.contextmanager
def no_process_group() -> Iterator[None]:
    """Context in which torch does not warn about ``no_dist=True``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def read_step(checkpoint: Path) -> int:
    """The step that a complete checkpoint of a run was saved after.

    Raises:
        UsageError: It cannot be read.
    """
    state = {"train_state.step": 0}
    try:
        with no_process_group():
            dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)  # pyright: ignore[reportPrivateImportUsage]  # torch documents this name but does not export it
    except CheckpointException as error:
        raise UsageError(
            f"checkpoint {checkpoint} cannot be loaded ({describe_failure(error)}); if it is damaged, delete the "
            "folder, or copy it again"
        ) from None
    return state["train_state.step"]


def first_failure(error: CheckpointException) -> BaseException:
    """The exception of the first rank that failed."""
    return next(iter(error.failures.values()))[0]


def describe_failure(error: CheckpointException) -> str:
    """`first_failure` on one line."""
    first = first_failure(error)
    return f"{type(first).__name__}: {' '.join(str(first).split())}".removesuffix(": ")
