"""``bash train.sh``: checks flags and machine, then starts NGPU processes of `flame.train` through torchrun."""

from flame.base.stop_signals import end_at_interrupt

if __name__ == "__main__":
    # until torchrun is started; set here, since importing torch and listing the GPUs take seconds
    end_at_interrupt()

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from flame.base.errors import LESS_MEMORY, UsageError, exit_on_usage_error
from flame.base.folder_lock import wait_until_free
from flame.base.log import init_logger, logger
from flame.base.stop_signals import LAUNCHER_PID, STOP_SIGNALS, stop_signals
from flame.config.parse import parse_args
from flame.machine import master_port, placement
from flame.machine.versions import warn_of_untested

# the machines of a run start at different times, on a busy cluster minutes apart
RENDEZVOUS_TIMEOUT_S = 900


def _integer(name: str, default: str, least: int) -> int:
    value = os.environ.get(name, default)
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        expected = "a positive integer" if least else "an integer of at least 0"
        raise UsageError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def _require_set(name: str, why: str) -> str:
    if not os.environ.get(name):
        raise UsageError(f"{name} must be set {why}")
    return os.environ[name]


def rendezvous_args() -> list[str]:
    """torchrun's arguments for the rendezvous of the processes.

    Raises:
        UsageError: NNODE, NODE_RANK, MASTER_ADDR or MASTER_PORT is wrong or missing.
    """
    num_nodes, rank = _integer("NNODE", "1", 1), _integer("NODE_RANK", "0", 0)
    if rank >= num_nodes:
        raise UsageError(f"NODE_RANK must be below NNODE={num_nodes}, got {rank}")
    if num_nodes == 1 and "MASTER_PORT" not in os.environ:
        # torchrun takes a free port and keeps it
        return ["--standalone"]
    address = "127.0.0.1"
    if num_nodes > 1:
        why = f"for NNODE={num_nodes}, the same on every machine"
        address = _require_set("MASTER_ADDR", f"{why}: the address of the one with NODE_RANK=0")
        _require_set("MASTER_PORT", f"{why}: a port that is free on the one with NODE_RANK=0")
        _require_set("NODE_RANK", f"for NNODE={num_nodes}: 0 to {num_nodes - 1}, one each")
    # static: torchrun's other backend (c10d) treats a port in use as its own rendezvous and joins a foreign run
    return [
        "--rdzv-backend=static",
        f"--nnodes={num_nodes}",
        f"--node-rank={rank}",
        f"--master-addr={address}",
        f"--master-port={_integer('MASTER_PORT', '', 1)}",
        f"--rdzv-conf=timeout={RENDEZVOUS_TIMEOUT_S}",
    ]


def _refuse_torchruns_variables() -> None:
    """Raises UsageError for variables that torchrun would take for its own flags, over those it gets here."""
    if given := [name for name in sorted(os.environ) if name.startswith("PET_")]:
        raise UsageError(
            f"{' '.join(f'{name}={os.environ[name]}' for name in given)}: torchrun would read "
            f"{'this' if len(given) == 1 else 'these'} instead of what train.sh tells it; unset "
            f"{' '.join(given)}. NGPU, NNODE, NODE_RANK, MASTER_ADDR and MASTER_PORT say which processes a run has"
        )


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[None]:
    """While this lasts, stop signals reach the processes of the run, which save, end and so end torchrun.

    A thread does it, woken through a pipe: Python runs handlers in the main thread alone, and there torchrun waits in
    C++, for other machines many minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = stop_signals()
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_pass_on, args=(reader, numbers), daemon=True).start()
    # Ctrl-C in a process whose Python is starting would print a traceback, so the processes inherit a mask, which
    # `end_at_interrupt` takes away. The thread started above keeps receiving SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def _pass_on(reader: int, numbers: tuple[signal.Signals, ...]) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    # empty when the other end is closed
    while heard := os.read(reader, 1):
        if heard[0] not in numbers:
            continue
        processes = children.read_text().split()
        if not processes:
            # torchrun has not started them yet, and those that it is starting end with this process
            os._exit(128 + heard[0])
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), heard[0])
    os.close(reader)


def main() -> None:
    """Checks the flags and the machine, and starts the processes of the run."""
    init_logger()
    argv = sys.argv[1:]
    with exit_on_usage_error():
        # a wrong flag is reported here, early and once, not by every process
        config = parse_args(argv)
        _refuse_torchruns_variables()
        warn_of_untested()
        num_processes = _integer("NGPU", "1", 1)
        args = [f"--nproc-per-node={num_processes}", *rendezvous_args()]
        logger.info("looking at this machine's processors, for which torch is imported")
        import torch  # seconds, which a wrong flag does not wait for

        bindings = placement.bind_processes(
            ngpu=num_processes,
            is_rocm=torch.version.hip is not None,
            allow_cross_numa=config.job.allow_cross_numa,
            allowed_cpus=frozenset(os.sched_getaffinity(0)),
            env=os.environ,
            argv=argv,
        )
        # one machine of a run hosts the port and writes the folder
        if os.environ.get("NODE_RANK", "0") == "0":
            if "MASTER_PORT" in os.environ:
                reservation = master_port.reserve_port(_integer("MASTER_PORT", "", 1))  # noqa: F841  # held to the end
            wait_until_free(config.dump_folder)
    # signals are passed on below and hidden from torchrun, which kills processes 30 s after a signal, even if they save
    args += ["--signals-to-handle=SIGQUIT"]
    num_cpus = len(os.sched_getaffinity(0))
    if bindings:
        args += ["-m", "flame.machine.bind_and_train", placement.to_json(bindings)]
        threads = placement.threads(bindings)
    else:
        args += ["-m", "flame.train"]
        threads = max(1, num_cpus // num_processes)
    for line in placement.describe(bindings):
        logger.info(line)
    if num_processes > num_cpus:
        logger.info(
            f"NGPU={num_processes} processes share {num_cpus} CPU core{'s' if num_cpus > 1 else ''} "
            "and wait for one another"
        )
    # torchrun gives each of several processes one thread; here each gets its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # threads that spin while they wait make a CPU run ten times slower as soon as another program wants
    # one of its cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ[LAUNCHER_PID] = str(os.getpid())
    logger.info(
        f"starting {num_processes} process{'es' if num_processes > 1 else ''}, each of which imports torch and "
        "transformers first"
    )
    _run([*args, *argv])


def _run(args: list[str]) -> None:
    """Runs torchrun; exits with the code of the process that failed first, and names the signal that killed it."""
    # here, so that a wrong flag does not wait for the import
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the process that failed has reported the error; torchrun would repeat it in a page
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with _passing_signals_on():
            torchrun.run(torchrun.parse_args(args))
    except ChildFailedError as error:
        # in the order in which they were seen, before torchrun ended the others; their times are the clock's, which may
        # be set back meanwhile
        rank, failure = next(iter(error.failures.items()))
        if failure.exitcode < 0 and -failure.exitcode not in STOP_SIGNALS:
            # it could not say so itself
            name = signal.Signals(-failure.exitcode).name
            memory = ""
            if name == "SIGKILL":
                memory = f", as the kernel does when memory runs out (then {LESS_MEMORY})"
            sys.stderr.write(
                f"flame: error: {name} killed rank {rank}{memory}; the same command continues the run\n"
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except DistError as error:
        with exit_on_usage_error():
            raise UsageError(
                f"the {os.environ.get('NNODE', '1')} machines (NNODE) did not meet at "
                f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT')}: "
                f"{str(error).splitlines()[0]}"
            ) from None


if __name__ == "__main__":
    main()
