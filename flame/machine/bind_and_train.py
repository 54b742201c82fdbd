"""``python -m flame.machine.bind_and_train BINDINGS [flags]``: binds itself to a GPU's CPUs and memory, then trains.

`flame.launch` starts a run's processes this way on a machine of several NUMA groups. torchrun's own
``--numa-binding`` needs the program numactl, starts the GPU runtime in the launcher and binds no memory.
Whatever starts threads, torch above all, is imported after the binding, which threads and processes inherit.
"""

import ctypes
import errno
import json
import os
import platform
import runpy
import sys

from flame.base.errors import UsageError, exit_on_usage_error
from flame.machine.numa import parse_ranges

# Source: set_mempolicy(2) and the kernel's tables of system calls
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_BIND = 2


def bind_cpus(cpus: frozenset[int]) -> None:
    """Binds this thread, and the threads and processes that it will start, to ``cpus``.

    Raises:
        UsageError: The kernel refuses.
    """
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise UsageError(f"cannot bind to CPUs {sorted(cpus)}: {error.strerror}") from None


def bind_memory(nodes: frozenset[int]) -> None:
    """Binds the memory of this thread, and of what it will start, to the NUMA ``nodes`` (first touch).

    Raises:
        OSError: The kernel refuses, as in a container without the capability.
    """
    if platform.machine() not in _SET_MEMPOLICY:
        raise OSError(errno.ENOSYS, f"not known on {platform.machine()}")
    # set_mempolicy reads one bit less than maxnode
    words = max(nodes) // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    number = ctypes.c_long(_SET_MEMPOLICY[platform.machine()])
    if libc.syscall(number, ctypes.c_int(_MPOL_BIND), mask, ctypes.c_ulong(words * 64 + 1)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    """Binds this process to the CPUs and memory of its group, and trains."""
    local_rank = int(os.environ["LOCAL_RANK"])
    binding = json.loads(sys.argv.pop(1))[local_rank]
    with exit_on_usage_error():
        bind_cpus(parse_ranges(binding["cpus"]))
        try:
            bind_memory(parse_ranges(binding["nodes"]))
        except OSError as error:
            if local_rank == 0:
                sys.stderr.write(
                    f"flame: memory is not bound to NUMA node {binding['nodes']} (set_mempolicy: {error.strerror}); "
                    "the kernel places it by the CPUs, which are bound. Docker allows it with --cap-add SYS_NICE\n"
                )
    runpy.run_module("flame.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
