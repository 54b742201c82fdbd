"""A signal ends the training after the step under way, on all ranks after the same one."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

# SIGUSR1 is what Slurm sends ahead of the time limit (--signal=USR1@120)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_REQUEST_S = 5


def stop_signals() -> tuple[signal.Signals, ...]:
    """`STOP_SIGNALS`, without SIGHUP where it is ignored: that is what nohup asks for."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(s for s in STOP_SIGNALS if not (is_ignored and s == signal.SIGHUP))


class StopRequest:
    """What this process has heard, and what all ranks have agreed on.

    Args:
        timeout: How long a rank waits for the others to agree.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.signal: signal.Signals | None = None
        self._time = 0.0
        # on the host, so that asking every step does not wait for the GPU
        self.group = dist.new_group(backend="gloo", timeout=timeout)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, a stop signal is noted and not obeyed."""
        handlers = {s: signal.signal(s, self._hear) for s in stop_signals()}
        try:
            yield
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)

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
