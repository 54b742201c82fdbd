"""Patches of torchtitan 0.2.2; `flame.titan` imports this module before torchtitan.

Each entry quotes the error that it prevents.
"""

import contextlib
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch._utils
import torch.distributed as dist

from flame.titan.profiling import trace_steps

if "torchtitan" in sys.modules:
    raise ImportError("flame.titan.patches must be imported before torchtitan")

# "module 'torch._C' has no attribute '_cuda_setDevice'": without a GPU torchtitan assumes CUDA
if torch._utils._get_available_device_type() is None:
    torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.components.metrics as titan_metrics
import torchtitan.distributed.utils as titan_distributed
from torchtitan.config import Comm, Profiling
from torchtitan.tools import profiling as titan_profiling
from torchtitan.tools import utils as titan_utils

# "ENV[...] = 1 will be overridden to 3": torchrun sets what torchtitan sets anew, and warns about
os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)

DEVICE_TYPE: str = titan_utils.device_type


class _HostMemoryMonitor:
    """Peak memory of this process, instead of the GPU's."""

    device_name = "cpu"
    device_capacity_gib = float("nan")

    def get_peak_stats(self) -> titan_metrics.DeviceMemStats:
        gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return titan_metrics.DeviceMemStats(gib, float("nan"), gib, float("nan"), 0, 0)

    def reset_peak_stats(self) -> None:
        """The kernel keeps one peak for the life of a process."""


def _set_pg_timeouts(timeout: timedelta, parallel_dims: "titan_distributed.ParallelDims") -> None:
    dist.barrier()
    meshes = parallel_dims.get_all_one_dimensional_meshes().values()
    for group in [*(mesh.get_group() for mesh in meshes), None]:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


# "`_set_pg_timeout` is deprecated": torchtitan calls it by the name that it had before torch 2.14
_c10d = dist.distributed_c10d
_c10d._set_pg_timeout = getattr(_c10d, "set_timeout", _c10d._set_pg_timeout)

if DEVICE_TYPE == "cpu":
    # "DTensor random operators may not have complete support on cpu device mesh", twice a process: our weights are
    # drawn whole, before they are sharded
    warnings.filterwarnings("ignore", message="DTensor .* may not have complete support on cpu")
    # "module 'torch.cpu' has no attribute 'get_device_name'"
    titan_metrics.build_device_memory_monitor = _HostMemoryMonitor
    # "barrier(): device_ids" is a TypeError with ['cpu']
    titan_distributed.set_pg_timeouts = _set_pg_timeouts

_get_peak_flops = titan_utils.get_peak_flops


def _known_peak_flops(device_name: str) -> float:
    """bf16 peak of a device in FLOP/s, NaN where torchtitan does not know it."""
    if DEVICE_TYPE == "cpu":
        return float("nan")
    # it logs that lspci is missing and that it takes the peak of an A100 for that of an unknown device
    titan_utils.logger.disabled = True
    peak, fallback = _get_peak_flops(device_name), _get_peak_flops("A100")
    titan_utils.logger.disabled = False
    return peak if peak != fallback or "A100" in device_name else float("nan")


# the MFU of an unknown device would be reported against an A100
titan_utils.get_peak_flops = _known_peak_flops


def _init_distributed(
    comm: Comm, enable_cpu_backend: bool = False, base_folder: str = "", ranks: None = None
) -> int:
    if comm.trace_buf_size:
        # read when a timeout is dumped, to this path with the rank behind it
        prefix = Path(base_folder) / comm.save_traces_folder / comm.save_traces_file_prefix
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(prefix.absolute())
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(comm.trace_buf_size)
    # 3: the watchdog ends the process without taking collectives back, or there would be nothing to dump
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "3"
    backend = dist.Backend.default_device_backend_map[DEVICE_TYPE]
    if enable_cpu_backend and DEVICE_TYPE != "cpu":
        backend = f"{DEVICE_TYPE}:{backend},cpu:gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=comm.init_timeout_seconds))
    return dist.get_world_size()


# it makes comm_traces/ in the dump folder before rank 0 has checked whose folder that is; here
# `flame.training.lost_processes` makes it, at the first step
titan_distributed.init_distributed = _init_distributed


@contextlib.contextmanager
def _maybe_enable_profiling(
    profiling: Profiling, *, global_step: int = 0, base_folder: str = "", leaf_folder: str = ""
) -> Iterator[torch.profiler.profile | None]:
    if not profiling.enable_profiling:
        yield None
        return
    folder = Path(base_folder) / profiling.save_traces_folder
    with trace_steps(folder, profiling.profile_freq, global_step) as profiler:
        yield profiler


# "Expected ProfilerActivity ... NoneType" on a CPU
titan_profiling.maybe_enable_profiling = _maybe_enable_profiling
