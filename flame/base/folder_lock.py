"""Locks a dump folder: a run holds the lock while it lives, and the launcher waits for it before it starts a run.

A sweep locks its folder in the same way.

It is flock(2) on a file that names the holder. It excludes processes of one machine, and of several machines if the
shared file system supports flock (NFS and GPFS do, Lustre if mounted with `flock`).
"""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from flame.base.errors import UsageError
from flame.base.log import logger

LOCK_FILE = "lock"
# a run that was killed may still be saving
WAIT_S = 30


def lock_folder(
    folder: Path, *, name: str = "--job.dump_folder", who: str = "run", waits: bool = True
) -> IO[bytes]:
    """Locks ``folder`` for as long as the file that it returns stays open.

    Args:
        folder: Folder that exists; the lock is its file `LOCK_FILE`.
        name: The user's name for the folder, such as a flag.
        who: The kind of process that holds it, for the message.
        waits: Wait up to `WAIT_S` seconds for a holder that is about to end.

    Raises:
        UsageError: A living process holds the lock.
        OSError: The file cannot be written, or the file system has no locks.
    """
    # not closed here: the lock lives as long as the file is open, and dies with the process
    lock = open(folder / LOCK_FILE, "ab+", buffering=0)  # noqa: SIM115
    _wait(folder, lock, name, who, WAIT_S if waits else 0)
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def wait_until_free(folder: Path) -> None:
    """Returns when no living run holds ``folder``, and writes nothing.

    Raises:
        UsageError: A run still holds it after `WAIT_S` seconds, or the file system has no locks.
    """
    try:
        # opened for writing, which NFS requires for a lock
        with open(folder / LOCK_FILE, "rb+", buffering=0) as lock:
            _wait(folder, lock, "--job.dump_folder", "run", WAIT_S)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"--job.dump_folder {folder} cannot be locked: {error}") from None


def _wait(folder: Path, lock: IO[bytes], name: str, who: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = f"{folder} is in use by another {who} ({lock.read().decode().strip()})"
        else:
            return
        if time.monotonic() >= deadline:
            raise UsageError(f"{name} {holder}; wait for it, stop it, or name another folder")
        if not told:
            logger.info(f"{holder}, waiting for it to end")
            told = True
        time.sleep(1)
