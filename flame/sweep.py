"""``python -m flame.sweep FILE``: arms x seeds x learning rates, trained and compared; docs/softpick/SWEEPS.md."""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import argparse
import os
import shlex
import signal
import sys

from flame.base.command_line import Parser, make_folder
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.folder_lock import lock_folder
from flame.base.log import init_logger, logger
from flame.base.paths import path_argument
from flame.sweeps.cost import estimate, require_disk
from flame.sweeps.plan import Sweep, read_sweep
from flame.sweeps.report import (
    LOSS_TABLE,
    PAGE,
    analysis_flags,
    analyze,
    best_runs,
    forget_report,
    loss_table,
    report_folder,
)
from flame.sweeps.runner import Runner, command_line
from flame.sweeps.slots import Slot, find_slots, refuse_per_run_variables
from flame.sweeps.state import State, read_state


def run_sweep(args: argparse.Namespace) -> int:
    """Trains the unfinished runs of a sweep and compares all; returns the exit code.

    Raises:
        UsageError: The file, the machine, the data or a run folder fails a check; nothing was started.
    """
    sweep = read_sweep(args.file)
    _require_out(sweep)
    refuse_per_run_variables(os.environ)
    config = sweep.runs[0].config
    try:
        slots = find_slots(
            ngpu=sweep.ngpu,
            parallel=sweep.parallel,
            runs_per_gpu=sweep.runs_per_gpu,
            allow_cross_numa=config.job.allow_cross_numa,
            env=os.environ,
        )
    except UsageError as error:
        raise UsageError(f"{sweep.file}: {error}") from None
    # imported late: it takes seconds, and a mistake in the file is reported before
    from flame.sweeps.check import check_runs, measure_arms, model_json
    from flame.titan.config import global_batch_size

    sizes = measure_arms(sweep)
    states = _states(sweep)
    cost = estimate(
        sweep,
        states,
        {arm: size.parameters for arm, size in sizes.items()},
        {arm: size.flops_per_token for arm, size in sizes.items()},
        sequences=global_batch_size(config, sweep.ngpu),
        slots=len(slots),
        tokens_per_second=args.tokens_per_second,
    )
    for line in [*cost.lines, *(f"slot    {slot.name}, NGPU={sweep.ngpu}" for slot in slots)]:
        logger.info(line)
    if args.dry_run:
        _print_commands(sweep, states)
    check_runs(sweep)
    require_disk(sweep, cost)
    if args.dry_run:
        logger.info("all checks passed; --dry_run: nothing was written or started")
        return 0
    name = f"{sweep.file}: out"
    make_folder(name, sweep.out)
    try:
        lock = lock_folder(sweep.out, name=name, who="sweep", waits=False)
    except OSError as error:
        raise UsageError(f"{name} {sweep.out} cannot be locked: {error}") from None
    with lock:
        sweep.model_file("").parent.mkdir(exist_ok=True)
        for arm in sweep.arms:
            sweep.model_file(arm.name).write_text(model_json(sweep, arm), encoding="utf-8")
        return _run(sweep, states, slots, args.summary_seconds)


def _run(sweep: Sweep, states: dict[str, State], slots: list[Slot], summary_s: float) -> int:
    left = [run for run in sweep.runs if not states[run.name].is_finished]
    done = len(sweep.runs) - len(left)
    if done:
        logger.info(f"{done} of {len(sweep.runs)} runs are finished and skipped")
    if left:
        forget_report(sweep)
    runner = Runner(sweep, left, slots, done=done, summary_s=summary_s)
    runner.run()
    failed = {f"run {name}": why for name, why in runner.failed.items()}
    if runner.stopped is not None:
        _say_failed(failed)
        logger.info(f"{runner.stopped.name}: the same command continues")
        return 128 + runner.stopped
    states = _states(sweep)
    best = [run for runs in best_runs(sweep, states).values() for run in runs]
    report = report_folder(sweep)
    if sweep.analyze is not None and best:
        why = analyze(sweep, best, slots[0])
        failed |= {"the analysis": why} if why else {}
    table = loss_table(sweep, states)
    report.mkdir(exist_ok=True)
    (report / LOSS_TABLE).write_text(table, encoding="utf-8")
    logger.info(f"losses, in {report / LOSS_TABLE}\n{table}")
    if sweep.analyze is not None and "the analysis" not in failed and best:
        logger.info(f"report {report / PAGE}")
    _say_failed(failed)
    return 1 if failed else 0


def _say_failed(failed: dict[str, str]) -> None:
    for what, why in failed.items():
        sys.stderr.write(f"flame: error: {what} failed, {why}\n")
    if failed:
        sys.stderr.write("flame: error: the same command tries again what failed, and that alone\n")


def _require_out(sweep: Sweep) -> None:
    nearest = next(x for x in (sweep.out, *sweep.out.parents) if os.path.lexists(x))
    if not nearest.is_dir():
        raise UsageError(
            f"{sweep.file}: out {sweep.out} must be a folder, but {nearest} is not one"
        )


def _states(sweep: Sweep) -> dict[str, State]:
    return {run.name: read_state(run) for run in sweep.runs}


def _print_commands(sweep: Sweep, states: dict[str, State]) -> None:
    """Prints the commands of the sweep for a shell, without GPUs: a run takes those of the slot that is free."""
    sys.stdout.write(f"# {sweep.out / 'models'} is written when the sweep starts\n")
    for run in sweep.runs:
        mark = "# finished: " if states[run.name].is_finished else ""
        sys.stdout.write(f"{mark}{command_line(sweep, run, Slot('any'))}\n")
    if sweep.analyze is not None:
        # the best rate is known only after training
        runs = [run for run in sweep.runs if run.learning_rate == _first_rate(sweep, run.arm)]
        words = shlex.join(["python", "-m", "flame.analyze", *analysis_flags(sweep, runs)])
        note = "# this command will name the best of several learning rates\n"
        sys.stdout.write((note if len(runs) < len(sweep.runs) else "") + words + "\n")


def _first_rate(sweep: Sweep, arm: str) -> float:
    return next(a.learning_rates[0] for a in sweep.arms if a.name == arm)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flame.sweep",
        description="Trains arms x seeds x learning rates and compares them; repeating the command continues.",
        epilog="docs/softpick/SWEEPS.md explains the file.",
    )
    # argparse prints the name of the type in its message
    _positive.__name__ = "positive number"
    parser.add_argument(
        "file", type=path_argument, help="TOML file of a sweep, such as those of configs/sweeps"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print what it costs and every command, check everything, and start nothing",
    )
    parser.add_argument(
        "--tokens_per_second",
        type=_positive,
        help="speed of one run while all slots are busy, from which the hours are estimated (default: that of the sweep's finished runs)",
    )
    parser.add_argument(
        "--summary_seconds",
        type=_positive,
        default=60.0,
        help="between two lines on what is running (default: %(default)s)",
    )
    return parser


def main() -> None:
    """Runs the sweep and exits with its code."""
    init_logger()
    with exit_on_usage_error():
        args = _parser().parse_args()
        try:
            code = run_sweep(args)
        except KeyboardInterrupt:
            logger.info("SIGINT: the same command continues")
            code = 128 + signal.SIGINT
    sys.exit(code)


if __name__ == "__main__":
    raise_at_interrupt()
    main()
