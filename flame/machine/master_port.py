"""Reserves MASTER_PORT for one run of the machine."""

import errno
import socket
import struct

from flame.base.errors import UsageError


def reserve_port(port: int) -> socket.socket:
    """Reserves ``port`` among the runs of the machine while the returned socket stays open.

    torchrun binds the port only later, so two runs that start at the same time would both find it free. The
    reservation is a socket in the kernel's abstract namespace: it is atomic, ends with its process, is visible to all
    users, and is separate in containers with their own network.

    Raises:
        UsageError: The port is in use or reserved.
    """
    if port > 65535:
        raise UsageError(f"MASTER_PORT must be at most 65535, got {port}")
    reservation = socket.socket(socket.AF_UNIX)
    name = f"\0flame MASTER_PORT {port}"
    try:
        reservation.bind(name)
        # other runs connect to learn the pid of this one
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
    """The run that holds the reservation; None if another program uses the port itself."""
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
