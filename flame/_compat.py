"""Everything that torchtitan 0.2.2 needs to be told; import this module before torchtitan.

Each entry names the error it prevents. Whatever else of ours touches torchtitan is in `titan.py`,
`trainer.py` and `parallelize.py`.
"""

import os
import resource
import sys
from datetime import timedelta

import torch
import torch._utils
import torch.distributed as dist

if "torchtitan" in sys.modules:
    raise ImportError("flame._compat must be imported before torchtitan")

# "module 'torch._C' has no attribute '_cuda_setDevice'": without a GPU torchtitan assumes CUDA
if torch._utils._get_available_device_type() is None:
    torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.components.metrics as titan_metrics
import torchtitan.distributed.utils as titan_distributed
from torchtitan.tools import utils as titan_utils

# "ENV[...] = 1 will be overridden to 3": torchrun sets what torchtitan sets anew, and warns about
os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING", None)

DEVICE_TYPE: str = titan_utils.device_type


class _HostMemoryMonitor:
    """Peak memory of this process, in the place of the GPU's."""

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


if DEVICE_TYPE == "cpu":
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
