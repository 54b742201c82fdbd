"""Reports a run in which a process ended or hangs: the collective that failed, and the trace before it."""

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flame.base.errors import PATIENCE_S, TrainingError
from flame.config.sections import JobConfig
from flame.run.metrics_file import strict_json

if TYPE_CHECKING:
    from flame.training.trainer import FlameTrainer

TRACE_FOLDER = "comm_traces"
# gloo's messages for a collective that other processes did not join
_LOST = re.compile(
    r"[Tt]imed out|[Tt]imeout|Connection closed by peer|Connection reset|Broken pipe"
)


def make_trace_folder(config: JobConfig) -> None:
    """Creates the trace folder, into which NCCL writes too; rank 0 has reserved the dump folder before."""
    if config.comm.trace_buf_size:
        _trace_folder(config).mkdir(exist_ok=True)


def _trace_folder(config: JobConfig) -> Path:
    return config.dump_folder / TRACE_FOLDER


@contextlib.contextmanager
def explain_lost_processes(trainer: "FlameTrainer") -> Iterator[None]:
    """Turns gloo's error for a collective that others did not join into a `TrainingError`, and writes the trace.

    NCCL writes its trace and ends the process by itself.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not _LOST.search(str(error)):
            raise
        if "TORCHELASTIC_RUN_ID" in os.environ:
            trainer.stop.exit_if_told(PATIENCE_S)
        file = _write_trace(trainer.config)
        where = f"; its last collectives are in {file}" if file else ""
        raise TrainingError(
            f"step {trainer.step}: another process ended, or did not answer within "
            f"--comm.train_timeout_seconds {trainer.config.comm.train_timeout_seconds}{where} ({error})"
        ) from error


def _write_trace(config: JobConfig) -> Path | None:
    """Writes the flight recorder of this process: as NCCL does, or with gloo only as JSON, since torchfrtrace does
    not read gloo's.
    """
    folder = _trace_folder(config)
    if not config.comm.trace_buf_size or not folder.is_dir():
        return None
    file = folder / f"rank_{dist.get_rank()}"
    c10d = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module without a type stub
    if torch.cuda.is_available():
        file.write_bytes(c10d._dump_nccl_trace())
        return file
    # safe to unpickle, since this process made it; torch's own JSON leaves out the stacks
    entries = pickle.loads(c10d._dump_fr_trace())["entries"]
    file = file.with_suffix(".json")
    file.write_text(strict_json(entries, indent=1) + "\n", encoding="utf-8")
    return file
