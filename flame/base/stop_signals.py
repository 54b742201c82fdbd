"""The signals that stop a run, and the end of a process whose parent was killed.

This module imports nothing slow: a parent that is killed while its child imports torch must end the child too.
"""

import ctypes
import os
import signal
import sys

# SIGUSR1 is what Slurm sends ahead of the time limit (--signal=USR1@120)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# set by `flame.launch` for the processes that torchrun starts
LAUNCHER_PID = "FLAME_LAUNCHER_PID"
_LIBC = ctypes.CDLL(None)


def stop_signals() -> tuple[signal.Signals, ...]:
    """`STOP_SIGNALS`, without SIGHUP if it is ignored, as under nohup."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(s for s in STOP_SIGNALS if not (is_ignored and s == signal.SIGHUP))


def end_at_interrupt() -> None:
    """Lets Ctrl-C end this process immediately and without a traceback, as long as there is nothing to save.

    A parent may have blocked SIGINT for the start of Python, whose handler would print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def raise_at_interrupt() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again: what follows `end_at_interrupt` in a program that cleans up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Asks the kernel to send this process ``number`` when ``parent``, which started it, dies.

    If it is dead already, the signal comes immediately. The request survives exec but not fork.
    """
    # Source: prctl(2), PR_SET_PDEATHSIG = 1
    _LIBC.prctl(1, int(number))
    # the parent died before the request
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher() -> None:
    """`end_with_parent` for a process of a run; nothing for one that was started by hand."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    # without the variable, the user called torchrun directly
    launcher = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    if os.getppid() != launcher:
        sys.stderr.write(f"flame: error: the launcher (pid {launcher}) is gone before the start\n")
    end_with_parent(launcher)
