"""The results of a sweep: a table of the losses, and `flame.analyze` on each arm's best models."""

import math
import os
import shlex
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from flame.base.log import logger
from flame.base.stop_signals import end_with_parent
from flame.sweeps.plan import REFERENCE_ARM, Analyze, Arm, Run, Sweep
from flame.sweeps.runner import last_error_line
from flame.sweeps.slots import Slot
from flame.sweeps.state import State

ANALYZER = [sys.executable, "-m", "flame.analyze"]
# written when the analysis is done, so that a repeated sweep skips it
_DONE_FILE = "command.txt"
LOSS_TABLE = "losses.md"
PAGE = "report.html"
"""Name of the page that `flame.analyze` writes."""


def best_runs(sweep: Sweep, states: dict[str, State]) -> dict[str, list[Run]]:
    """The runs of each arm's best learning rate, one per seed.

    The best rate has the lowest mean validation loss over the seeds, among rates whose seeds are all finished.
    An arm without such a rate is left out.
    """
    best = {}
    for arm in sweep.arms:
        if losses := _losses_by_rate(sweep, arm, states):
            best[arm.name] = _runs_at_rate(sweep, arm, min(losses, key=losses.__getitem__))
    return best


def _losses_by_rate(sweep: Sweep, arm: Arm, states: dict[str, State]) -> dict[float, float]:
    """Learning rate -> mean validation loss over the seeds, for rates whose seeds are all finished."""
    rates = {rate: _runs_at_rate(sweep, arm, rate) for rate in arm.learning_rates}
    return {
        rate: statistics.fmean(_losses(runs, states))
        for rate, runs in rates.items()
        if all(states[run.name].is_finished for run in runs)
    }


def fitted_minimum(losses: dict[float, float]) -> tuple[float, float] | None:
    """Learning rate and loss at the minimum of a parabola over the logarithm of the rate.

    The parabola goes through the lowest loss and its neighbours.

    Args:
        losses: Learning rate -> loss.

    Returns:
        None if the lowest loss is at the end of the range, so that the minimum may lie outside, or next to a loss that is
        not finite.
    """
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    near = rates[max(0, best - 1) : best + 2]
    if len(near) < 3 or not all(math.isfinite(losses[rate]) for rate in near):
        return None
    x0, x1, x2 = (math.log(rate) for rate in near)
    y0, y1, y2 = (losses[rate] for rate in near)
    # Newton's form: y0 + slope (x - x0) + curvature (x - x0) (x - x1); y0 > y1 <= y2, so that it curves upwards
    slope = (y1 - y0) / (x1 - x0)
    curvature = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    x = (x0 + x1) / 2 - slope / (2 * curvature)
    return math.exp(x), y0 + slope * (x - x0) + curvature * (x - x0) * (x - x1)


def _runs_at_rate(sweep: Sweep, arm: Arm, rate: float) -> list[Run]:
    return [run for run in sweep.runs if run.arm == arm.name and run.learning_rate == rate]


def _losses(runs: list[Run], states: dict[str, State]) -> list[float]:
    return [states[run.name].validation_loss for run in runs]  # pyright: ignore[reportReturnType]  # the runs are finished, so they have a loss


def loss_table(sweep: Sweep, states: dict[str, State]) -> str:
    """The losses in Markdown: each arm at its best rate and between its rates, then every rate and every run."""
    best = best_runs(sweep, states)
    lines = [
        f"# {sweep.name}: validation losses",
        "",
        "Nats per token (a byte with the byte tokenizer) on the held-out data after the last step. Spread: sample "
        "standard deviation over the seeds, – with one seed.",
        "",
        "## Each arm at its best learning rate",
        "",
        f"Gap: the arm's loss less that of {REFERENCE_ARM} with the same seed, that is, the same data order and initial "
        "weights; mean and spread over the seeds that both have.",
        "",
        f"| arm | learning rate | seeds | loss | spread | gap to {REFERENCE_ARM} | spread of the gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in sweep.arms:
        if arm.name not in best:
            lines.append(f"| {arm.name} | no rate with all seeds finished | | | | | |")
            continue
        runs = best[arm.name]
        gaps = _gaps(runs, best.get(REFERENCE_ARM, []), states)
        cells = [arm.name, f"{runs[0].learning_rate}", f"{len(runs)}"]
        cells += _mean_and_spread(_losses(runs, states))
        cells += ["–", "–"] if arm.name == REFERENCE_ARM else _mean_and_spread(gaps, sign="+")
        lines.append(f"| {' | '.join(cells)} |")
    lines += _fit_table(sweep, states)
    lines += [
        "",
        "## Every learning rate",
        "",
        "| arm | learning rate | seeds finished | loss | spread |",
    ]
    lines.append("|---|---|---|---|---|")
    for arm in sweep.arms:
        for rate in arm.learning_rates:
            runs = _runs_at_rate(sweep, arm, rate)
            done = [run for run in runs if states[run.name].is_finished]
            cells = [arm.name, f"{rate}", f"{len(done)} of {len(runs)}"]
            cells += _mean_and_spread(_losses(done, states))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Every run", "", "| arm | learning rate | seed | loss |", "|---|---|---|---|"]
    for run in sweep.runs:
        state = states[run.name]
        loss = (
            f"{state.validation_loss:.4f}"
            if state.is_finished
            else f"unfinished, step {state.step}"
        )
        lines.append(f"| {run.arm} | {run.learning_rate} | {run.seed} | {loss} |")
    return "\n".join(lines) + "\n"


def _fit_table(sweep: Sweep, states: dict[str, State]) -> list[str]:
    """The minimum of each arm between its rates; nothing if no arm has three rates with all seeds finished."""
    by_arm = {arm.name: _losses_by_rate(sweep, arm, states) for arm in sweep.arms}
    fits = {arm: fitted_minimum(losses) for arm, losses in by_arm.items() if len(losses) >= 3}
    if not fits:
        return []
    lines = [
        "",
        "## The minimum between the learning rates",
        "",
        "Minimum of a parabola over the logarithm of the rate, through the lowest mean loss and its neighbours.",
        "",
        f"| arm | learning rate | loss | gap to {REFERENCE_ARM} |",
        "|---|---|---|---|",
    ]
    reference = fits.get(REFERENCE_ARM)
    for arm, fit in fits.items():
        if fit is None:
            lines.append(f"| {arm} | none: the lowest loss is at the end of the range | | |")
            continue
        gap = "–"
        if reference is not None and arm != REFERENCE_ARM:
            gap = f"{fit[1] - reference[1]:+.4f}"
        lines.append(f"| {arm} | {fit[0]:.3g} | {fit[1]:.4f} | {gap} |")
    return lines


def _gaps(runs: list[Run], reference: list[Run], states: dict[str, State]) -> list[float]:
    of_seed = dict(zip((run.seed for run in reference), _losses(reference, states), strict=True))
    return [
        states[run.name].validation_loss - of_seed[run.seed]  # pyright: ignore[reportOptionalOperand]  # the runs are finished, so they have a loss
        for run in runs
        if run.seed in of_seed
    ]


def _mean_and_spread(values: list[float], sign: str = "") -> list[str]:
    if not values:
        return ["–", "–"]
    spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
    return [f"{statistics.fmean(values):{sign}.4f}", spread]


def analysis_flags(sweep: Sweep, runs: list[Run]) -> list[str]:
    """The flags of `flame.analyze` for ``runs``; arms are labels, `REFERENCE_ARM` the first, seeds models of a label."""
    a: Analyze = sweep.analyze  # pyright: ignore[reportAssignmentType]  # called only if the file has an [analyze] table
    # the report compares with the first arm
    runs = sorted(runs, key=lambda run: run.arm != REFERENCE_ARM)
    flags = ["--model", *(str(run.folder / "hf") for run in runs)]
    flags += ["--label", *(run.arm for run in runs)]
    flags += ["--run", *(str(run.folder) for run in runs)]
    flags += ["--data", a.data, "--out", str(report_folder(sweep))]
    flags += [f"--{name}" for name in ("held_out", "interventions") if getattr(a, name)]
    if a.samples is not None:
        flags += ["--samples", str(a.samples)]
    for name in ("lengths", "bits", "passkey_lengths"):
        if values := getattr(a, name):
            flags += [f"--{name}", *map(str, values)]
    return flags


def report_folder(sweep: Sweep) -> Path:
    """Folder of the sweep's report."""
    return sweep.out / "report"


def forget_report(sweep: Sweep) -> None:
    """Marks the report as outdated, before a run of the sweep is trained."""
    (report_folder(sweep) / _DONE_FILE).unlink(missing_ok=True)


def analyze(sweep: Sweep, runs: list[Run], slot: Slot) -> str | None:
    """Writes the report on ``runs`` into `out`/report, unless it exists already.

    Args:
        sweep: The sweep, which defines the measurements.
        runs: The models, from `best_runs`.
        slot: Provides the GPUs.

    Returns:
        The error and the path of the log, or None.
    """
    flags = analysis_flags(sweep, runs)
    command = shlex.join(["python", "-m", "flame.analyze", *flags])
    done = report_folder(sweep) / _DONE_FILE
    if done.is_file() and done.read_text(encoding="utf-8") == command + "\n":
        logger.info(f"report {report_folder(sweep)}: there already")
        return None
    # flame.analyze refuses a folder with files other than its own
    for name in (_DONE_FILE, LOSS_TABLE):
        (report_folder(sweep) / name).unlink(missing_ok=True)
    log = sweep.out / "report.log"
    logger.info(f"analysing, log {log}: {command}")
    with open(log, "wb") as stream:
        code = subprocess.run(
            [*ANALYZER, *flags],
            env=os.environ | slot.env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            preexec_fn=partial(end_with_parent, os.getpid()),
        ).returncode
    if code:
        return f"exit code {code}: {last_error_line(log)}; log {log}"
    done.write_text(command + "\n", encoding="utf-8")
    return None
