"""A signal ends the training after the step under way, on all ranks after the same one."""

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
    """What this process has heard, and what all ranks have agreed on.

    Args:
        timeout: How long a rank waits for the others to agree.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.signal: signal.Signals | None = None
        self._time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        # on the host, so that asking every step does not wait for the GPU
        self.group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportAttributeAccessIssue]  # an int where this process is none of the group, which holds all

    def listen(self) -> None:
        """From now on a stop signal is noted; before, it ends the process at once."""
        if not self._handlers:
            self._handlers = {s: signal.signal(s, self._hear) for s in stop_signals()}

    def close(self) -> None:
        """From now on a stop signal ends the process at once again."""
        for s, handler in self._handlers.items():
            signal.signal(s, handler)
        self._handlers = {}

    def exit_if_told(self, seconds: float) -> None:
        """Ends the process by the signal that it has heard, or hears in the next ``seconds``.

        torchrun sends one to all processes when one has failed, and that one has said why.
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
            # Ctrl-C again: at once, without waiting for a save under way, which a kill cannot harm.
            # Other signals come twice by themselves, as Slurm's warning and then its time limit do.
            os._exit(128 + number)

    def agree(self, failed: bool) -> tuple[signal.Signals | None, bool]:
        """The signal that any rank has heard, and whether any rank has ``failed``; the same on every rank."""
        # one process may hear the signal a step before another
        heard = torch.tensor([self.signal or 0, failed])
        dist.all_reduce(heard, dist.ReduceOp.MAX, group=self.group)
        number, any_failed = heard.tolist()
        return signal.Signals(number) if number else None, bool(any_failed)
