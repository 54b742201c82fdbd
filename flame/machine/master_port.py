"""MASTER_PORT belongs to one run: free for the network, and claimed before any other run can."""

import errno
import socket
import struct

from flame.base.errors import UsageError


def reserve_port(port: int) -> socket.socket:
    """Makes ``port`` this process's among the runs of the machine, as long as the socket returned stays open.

    torchrun binds the port only later, so that two runs started at once would both find it free. The claim is a
    socket in the kernel's abstract namespace: taken at once or not at all, gone with its process, the same for
    all users, and separate for containers with ports of their own.

    Raises:
        UsageError: The port is taken or reservation.
    """
    if port > 65535:
        raise UsageError(f"MASTER_PORT must be at most 65535, got {port}")
    reservation = socket.socket(socket.AF_UNIX)
    name = f"\0flame MASTER_PORT {port}"
    try:
        reservation.bind(name)
        # so that others can ask whose it is
        reservation.listen()
        _require_free(port)
    except OSError as error:
        reservation.close()
        reason = error.strerror
        if error.errno == errno.EADDRINUSE:
            reason = _holder(name) or reason
        raise UsageError(
            f"MASTER_PORT must be a free port, one for each run, got {port}: {reason}; "
            f"{_free_port()} is free"
        ) from None
    return reservation


def _require_free(port: int) -> None:
    with socket.socket() as s:
        # as torchrun does: a port that was in use a minute ago is free
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("", port))


def _holder(name: str) -> str | None:
    """The run that has the claim, None if there is none and another program has the port itself."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(1)
        try:
            s.connect(name)
        except OSError:
            return None
        pid, _, _ = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"the run of pid {pid} on {socket.gethostname()} has it"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]
