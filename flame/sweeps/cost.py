"""Cost of a sweep: tokens, FLOPs, hours and disk."""

import heapq
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from flame.base.errors import UsageError
from flame.sweeps.plan import Run, Sweep
from flame.sweeps.state import State

_STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: weights and two moments in float32."""
_EXPORT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a sweep will take, and whether the disk holds it."""

    lines: list[str]
    """The estimate as lines of text for the log."""
    missing_bytes: int
    """Disk that the unfinished runs need beyond what is free; 0 if it is enough."""


def estimate(
    sweep: Sweep,
    states: dict[str, State],
    parameters: dict[str, int],
    flops_per_token: dict[str, int],
    *,
    sequences: int,
    slots: int,
    tokens_per_second: float | None,
) -> Cost:
    """The cost of the sweep, and of what is left of it.

    Args:
        sweep: What to run.
        states: State of each run, by its name.
        parameters: Number of parameters of each arm's model.
        flops_per_token: Training FLOPs per token of each arm.
        sequences: Sequences in an optimizer step.
        slots: Number of runs at a time.
        tokens_per_second: Speed of one run while ``slots`` run; None: measured from the runs that exist.
    """
    left = [run for run in sweep.runs if not states[run.name].is_finished]
    tokens = {run.name: _tokens(run, sequences) for run in sweep.runs}
    flops = sum(tokens[run.name] * flops_per_token[run.arm] for run in sweep.runs)
    t = sweep.runs[0].config.training
    lines = [
        f"sweep {sweep.name}: {len(sweep.runs)} runs of {len(sweep.arms)} arms, "
        f"{len(sweep.runs) - len(left)} finished, {len(left)} to do, {slots} at a time",
    ]
    for arm in sweep.arms:
        rates = ", ".join(map(str, arm.learning_rates))
        seeds = ", ".join(map(str, arm.seeds))
        lines.append(
            f"  {arm.name}: {parameters[arm.name]:,} parameters, lr {rates}, seeds {seeds}"
        )
    lines += [
        f"tokens  {tokens[sweep.runs[0].name]:,} per run ({t.steps:,} steps of {sequences} x {t.seq_len}), "
        f"{sum(tokens.values()):,} in all",
        f"FLOPs   {flops:.2e} in all, attention counted without its causal half taken off",
        f"time    {_time(left, states, tokens, sequences, slots, tokens_per_second)}",
    ]
    needed = sum(_bytes(run, parameters[run.arm]) - _used(run.folder) for run in left)
    # a run that is saving holds one more checkpoint
    needed += slots * _STATE_BYTES * max(parameters.values()) if left else 0
    needed, free = max(0, needed), _free(sweep.out)
    lines.append(
        f"disk    {needed / 2**30:.2f} GiB to come at most (checkpoints and exported models), "
        f"{free / 2**30:.2f} GiB free"
    )
    return Cost(lines, max(0, needed - free))


def require_disk(sweep: Sweep, cost: Cost) -> None:
    """Raises UsageError if the disk would fill up."""
    if cost.missing_bytes:
        raise UsageError(
            f"{sweep.file}: out {sweep.out} needs {cost.missing_bytes / 2**30:.2f} GiB more than its disk has free; "
            "free it, name another `out`, or lower checkpoint.keep_latest_k in [base]"
        )


def _tokens(run: Run, sequences: int) -> int:
    return run.config.training.steps * sequences * run.config.training.seq_len


def _time(
    left: list[Run],
    states: dict[str, State],
    tokens: dict[str, int],
    sequences: int,
    slots: int,
    tokens_per_second: float | None,
) -> str:
    if not left:
        return "0 hours: all is done"
    speed = tokens_per_second
    source = "as given by --tokens_per_second"
    if speed is None:
        measured = [x.seconds_per_step for x in states.values() if x.is_finished]
        measured = [x for x in measured if x]
        if not measured:
            return (
                "unknown until the first run has finished; --tokens_per_second of one run tells it"
            )
        per_step = sequences * left[0].config.training.seq_len
        speed = per_step * len(measured) / sum(measured)
        source = f"as measured in {len(measured)} finished runs"
    # greedy schedule: each run takes the slot that is free first
    ends = [0.0] * slots
    for run in left:
        share = 1 - states[run.name].step / run.config.training.steps
        heapq.heappush(ends, heapq.heappop(ends) + share * tokens[run.name] / speed)
    return (
        f"{max(ends) / 3600:.2f} hours of training to come at {speed:,.0f} tokens/s per run, {source}; starting, "
        "compiling and the report not counted"
    )


def _bytes(run: Run, parameters: int) -> int:
    """Bytes on disk of a finished run: checkpoints and exports."""
    checkpoint = run.config.checkpoint
    saves = math.ceil(run.config.training.steps / checkpoint.interval)
    kept = min(saves, checkpoint.keep_latest_k or saves)
    export = _EXPORT_BYTES[checkpoint.export_dtype]
    exports = 1 + kept * checkpoint.convert_to_hf_on_save
    return parameters * (kept * _STATE_BYTES + exports * export)


def _used(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def _free(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
