"""Ends the training after the current step on a signal, at the same step on all ranks."""

import os
import signal
import sys
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from flame.base.stop_signals import stop_signals

_SAME_REQUEST_S = 5


class StopRequest:
    """Stop signals of this process, and the agreement of all ranks on them.

    Args:
        timeout: How long a rank waits for the others to agree.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.signal: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        # on the host, so that asking every step does not wait for the GPU
        self.group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportAttributeAccessIssue]  # new_group returns an int to processes outside the group; this group has all

    def listen(self) -> None:
        """From now on a stop signal is recorded; before, it ends the process immediately."""
        if not self._handlers:
            self._handlers = {s: signal.signal(s, self._hear) for s in stop_signals()}

    def close(self) -> None:
        """From now on a stop signal ends the process immediately again."""
        for s, handler in self._handlers.items():
            signal.signal(s, handler)
        self._handlers = {}

    def exit_if_told(self, seconds: float) -> None:
        """Exits if a signal was received, or is received within ``seconds``.

        When a process fails, torchrun signals all others; the failed process has reported the error.
        """
        self.close()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.signal is not None:
                sys.exit(128 + self.signal)
            time.sleep(0.1)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._time > _SAME_REQUEST_S:
            # a second Ctrl-C ends immediately, without waiting for a save in progress, which a kill cannot damage.
            # Other signals may come twice by themselves, such as Slurm's warning and then its time limit.
            os._exit(128 + number)

    def agree(self, failed: bool) -> tuple[signal.Signals | None, bool]:
        """The signal that any rank has received, and whether any rank has ``failed``; the same on every rank."""
        # a process may receive the signal one step before another
        heard = torch.tensor([self.signal or 0, failed])
        dist.all_reduce(heard, dist.ReduceOp.MAX, group=self.group)
        number, any_failed = heard.tolist()
        return signal.Signals(number) if number else None, bool(any_failed)
