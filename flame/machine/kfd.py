"""The AMD GPUs that the kernel driver lists, whether or not this process may use them."""

import os

from flame.machine import numa

PARTITIONED = ("DPX", "TPX", "QPX", "CPX")
"""Modes in which a GPU shows as 2, 3, 4, or as many as it has compute dies: 8 on MI300X."""


def num_gpus() -> int:
    """GPUs that the driver lists, each partition counted; 0 without the driver.

    A container sees the folders of all GPUs, but may read only the properties of those that it may use; those of CPUs
    are always readable.
    """
    count = 0
    for file in (numa.ROOT / "sys/class/kfd/kfd/topology/nodes").glob("*/properties"):
        try:
            properties = dict(line.split() for line in file.read_text().splitlines())
        except OSError:
            count += 1
            continue
        # a node without compute units is a CPU
        count += properties.get("simd_count", "0") != "0"
    return count


def access_problem() -> str | None:
    """Why this process may use no GPU, with the remedy; None if the device files can be opened."""
    kfd, dri = numa.ROOT / "dev/kfd", numa.ROOT / "dev/dri"
    renders = sorted(dri.glob("renderD*"))
    for path, found in ((kfd, kfd.exists()), (f"{dri}/renderD*", bool(renders))):
        if not found:
            return (
                f"{path} does not exist here; a container needs --device=/dev/kfd --device=/dev/dri"
            )
    for paths in ([kfd], renders):
        if not any(os.access(path, os.R_OK | os.W_OK) for path in paths):
            return f"this user may not open {paths[0]}; join its group (render or video)"
    return None


def partition_modes(address: str) -> tuple[str, str]:
    """How the GPU at a PCI address is partitioned, as in ("CPX", "NPS4"); "" where the driver does not say."""
    device = numa.ROOT / "sys/bus/pci/devices" / address
    modes = []
    for kind in ("compute", "memory"):
        try:
            modes.append((device / f"current_{kind}_partition").read_text().strip())
        except OSError:
            modes.append("")
    return modes[0], modes[1]
