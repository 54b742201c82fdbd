"""Traces of training steps, on a GPU or a CPU; torchtitan's own profiling requires a GPU."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from flame.base.log import logger

WARMUP_STEPS, TRACED_STEPS = 3, 1


@contextlib.contextmanager
def trace_steps(folder: Path, every: int, first_step: int) -> Iterator[torch.profiler.profile]:
    """Writes ``iteration_N/rankR_trace.json`` of one step in ``every``; call ``step()`` after each step.

    Args:
        folder: Created if it does not exist.
        every: Steps from one trace to the next, at least `WARMUP_STEPS` and `TRACED_STEPS` together.
        first_step: Steps before the first call of ``step()``.
    """

    def write(profiler: torch.profiler.profile) -> None:
        step = first_step + profiler.step_num
        file = folder / f"iteration_{step}" / f"rank{dist.get_rank()}_trace.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        logger.info(f"trace of step {step} in {file}")

    # silences lines of the profiler and a warning about tracing one step per file, which is intended
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    warnings.filterwarnings("ignore", message=".*Profiler clears events")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait = every - WARMUP_STEPS - TRACED_STEPS
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=wait, warmup=WARMUP_STEPS, active=TRACED_STEPS),
        on_trace_ready=write,
        record_shapes=True,
    ) as profiler:
        yield profiler
