"""``bash train.sh``: reads the flags, then starts NGPU processes of `flame.train` through torchrun."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from flame.config import parse_args
from flame.errors import UsageError, exit_on_usage_error


def _positive_integer(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _require_free(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"MASTER_PORT must be a free port, one for each run, got {port}: {error}"
            ) from None


def torchrun_args(argv: list[str]) -> list[str]:
    """torchrun's own command line for this machine.

    Raises:
        UsageError: NGPU or MASTER_PORT is no number, or the port is taken.
    """
    args = [f"--nproc-per-node={_positive_integer('NGPU', '1')}"]
    if "MASTER_PORT" in os.environ:
        port = _positive_integer("MASTER_PORT", "")
        _require_free(port)
        args += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    else:
        args += ["--standalone"]
    # the others are passed on below, without torchrun's knowing: it would kill after 30 s what still saves
    args += ["--signals-to-handle=SIGQUIT"]
    return [*args, "-m", "flame.train", *argv]


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Sends a signal to the processes of the run, which save, end and so end torchrun."""
    processes = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    if not processes:
        # torchrun has not started them yet
        sys.exit(128 + number)
    for process in processes:
        os.kill(int(process), number)


def main() -> None:
    with exit_on_usage_error():
        # a wrong flag is answered here, in a second, and not once for every process
        parse_args(sys.argv[1:])
        args = torchrun_args(sys.argv[1:])
    # torchrun gives each of several processes one thread; a CPU run wants its share of the cores
    threads = max(1, len(os.sched_getaffinity(0)) // _positive_integer("NGPU", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # threads that spin while they wait make a CPU run ten times slower as soon as another program wants
    # one of its cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # the process that failed has said why; torchrun would say so again, in a page
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    try:
        torchrun.run(torchrun.parse_args(args))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


if __name__ == "__main__":
    main()
