"""The processes of a sweep: starts runs in slots, passes signals on to them, and logs their progress."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from flame.base.log import logger
from flame.base.stop_signals import STOP_SIGNALS, end_with_parent, stop_signals
from flame.sweeps.plan import Run, Sweep
from flame.sweeps.slots import Slot
from flame.sweeps.state import State, read_state

# same as `bash train.sh`
LAUNCHER = [sys.executable, "-m", "flame.launch"]
_POLL_S = 0.2


def environment(sweep: Sweep, run: Run, slot: Slot) -> dict[str, str]:
    """Variables that the processes of a run get in addition to the environment of the sweep."""
    env = slot.env | {"NGPU": str(sweep.ngpu)}
    if run.config.metrics.enable_wandb:
        # the folder's name, which is wandb's default, lacks the arm
        env["WANDB_NAME"] = f"{sweep.name}-{run.arm}-{run.folder.name}"
    return env


def command_line(sweep: Sweep, run: Run, slot: Slot) -> str:
    """The run as a line for a shell."""
    words = [
        f"{name}={shlex.quote(value)}" for name, value in environment(sweep, run, slot).items()
    ]
    return " ".join([*words, shlex.join(["bash", "train.sh", *run.flags])])


@dataclass(slots=True)
class _Job:
    run: Run
    slot: Slot
    process: subprocess.Popen[bytes]
    start: float
    log_start: int
    """Size of the log before this start wrote to it."""
    is_new: bool
    """Whether it started at step 0."""


class Runner:
    """Executes the unfinished runs of a sweep in its slots.

    Args:
        sweep: The sweep of the runs.
        runs: The unfinished runs, in order.
        slots: Each takes one run at a time.
        done: Number of runs that are finished already.
        summary_s: Seconds between two log lines on all running runs.
    """

    def __init__(
        self, sweep: Sweep, runs: list[Run], slots: list[Slot], *, done: int, summary_s: float
    ) -> None:
        self.sweep = sweep
        self.waiting, self.free = list(runs), list(slots)
        self.running: list[_Job] = []
        self.done = done
        self.failed: dict[str, str] = {}
        """Name of a run -> the error and the path of its log."""
        self.stopped: signal.Signals | None = None
        self._heard: list[int] = []
        self._num_slots = len(slots)
        # seconds from start to export of finished runs
        self._durations: list[float] = []
        self._summary_s = summary_s
        self._next_summary = time.monotonic() + summary_s

    def run(self) -> None:
        """Returns when all runs have ended; after a signal, when the started ones have."""
        with self._listening():
            while self.running or (self.waiting and self.stopped is None):
                self._pass_on()
                while self.stopped is None and self.waiting and self.free:
                    self._start(self.waiting.pop(0), self.free.pop(0))
                for job in list(self.running):
                    if job.process.poll() is not None:
                        self._end(job)
                if time.monotonic() >= self._next_summary:
                    self._next_summary = time.monotonic() + self._summary_s
                    logger.info(self._summary())
                time.sleep(_POLL_S)
            # a signal that arrived while the last run ended
            self._pass_on()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            self._heard.append(number)

        before = {s: signal.signal(s, hear) for s in stop_signals()}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _pass_on(self) -> None:
        """Passes received signals on to the runs, which save and end; a second Ctrl-C ends them immediately."""
        while self._heard:
            number = signal.Signals(self._heard.pop(0))
            self.stopped = self.stopped or number
            for job in self.running:
                job.process.send_signal(number)
            names = ", ".join(job.run.name for job in self.running)
            wait = f"passed on, waiting for {names} to save and end" if names else "no run to stop"
            logger.info(f"{number.name}: {wait}")

    def _start(self, run: Run, slot: Slot) -> None:
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with open(run.log, "ab") as log:
            log.write(f"# {command_line(self.sweep, run, slot)}\n".encode())
            log.flush()
            size = log.tell()
            process = subprocess.Popen(
                [*LAUNCHER, *run.flags],
                env=os.environ | environment(self.sweep, run, slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # a terminal's Ctrl-C is passed on once, by the sweep
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),
            )
        step = read_state(run).step
        self.running.append(_Job(run, slot, process, time.time(), size, is_new=step == 0))
        verb = f"continues, it had logged step {step}," if step else "starts"
        logger.info(f"{run.name}: {verb} on {slot.name}, log {run.log}")

    def _end(self, job: _Job) -> None:
        self.running.remove(job)
        self.free.append(job.slot)
        run, code, state = job.run, job.process.returncode, read_state(job.run)
        if code == 0 and state.is_finished:
            self.done += 1
            if job.is_new:
                self._durations.append(time.time() - job.start)
            logger.info(
                f"{run.name}: finished, validation loss {state.validation_loss:.4f}, after {format_duration(time.time() - job.start)}"
            )
        elif self.stopped is not None and _is_stop(code):
            logger.info(f"{run.name}: stopped at step {state.step}")
        else:
            why = f"exit code {code}: {last_error_line(run.log, job.log_start)}"
            if code == 0:
                why = f"its folder has no export, or no finite validation loss of the last step: {state}"
            self.failed[run.name] = f"{why}; log {run.log}"
            logger.info(f"{run.name}: failed, {self.failed[run.name]}")

    def _summary(self) -> str:
        states = [(job, read_state(job.run, job.start)) for job in self.running]
        counts = f"{self.done} finished, {len(self.running)} running, {len(self.waiting)} waiting"
        if self.failed:
            counts += f", {len(self.failed)} failed"
        if self._durations:
            counts += f", about {format_duration(self._seconds_left(states))} left"
        return " | ".join([counts, *(f"{job.run.name} {_progress(job, s)}" for job, s in states)])

    def _seconds_left(self, states: list[tuple[_Job, State]]) -> float:
        """Seconds until all runs have ended, from the mean duration of the runs that ran from start to end."""
        mean = sum(self._durations) / len(self._durations)
        shares = (1 - state.step / job.run.config.training.steps for job, state in states)
        return mean * (sum(shares) + len(self.waiting)) / self._num_slots


def _progress(job: _Job, state: State) -> str:
    steps = job.run.config.training.steps
    words = [f"step {state.step}/{steps}"]
    if state.loss is not None:
        words.append(f"loss {state.loss:.4f}")
    if state.seconds_per_step is not None:
        words.append(f"{format_duration(state.seconds_per_step * (steps - state.step))} left")
    return ", ".join(words)


def _is_stop(code: int) -> bool:
    """Whether a process ended by a stop signal, either after it saved or before it handled signals."""
    return code in {128 + s for s in STOP_SIGNALS} | {-s for s in STOP_SIGNALS}


def last_error_line(log: Path, start: int = 0) -> str:
    """The last error line of a log after byte ``start``, else its last line."""
    with open(log, "rb") as stream:
        stream.seek(start)
        lines = [x for x in stream.read().decode(errors="replace").splitlines() if x.strip()]
    errors = [line for line in lines if line.startswith("flame: error: ")]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("flame: error: ").strip()


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds as ``h:mm:ss``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
