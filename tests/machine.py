"""A machine that is not there: the part of /sys that `flame.machine.numa` reads, in a folder."""

from pathlib import Path


def address(number: int) -> str:
    """PCI address of GPU ``number`` of the machine."""
    return f"0000:{number + 1:02x}:00.0"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def build(root: Path, *, nodes: list[tuple[int, str]], gpus: list[int]) -> Path:
    """A machine of ``nodes`` (socket, CPUs) and of GPUs, each given by its NUMA node."""
    system = root / "sys/devices/system"
    for node, (socket, cpus) in enumerate(nodes):
        write(system / f"node/node{node}/cpulist", cpus)
        first = cpus.split(",")[0].split("-")[0]
        if first:
            write(system / f"cpu/cpu{first}/topology/physical_package_id", socket)
    for file in ("online", "possible"):
        write(system / "node" / file, f"0-{len(nodes) - 1}")
    for number, node in enumerate(gpus):
        write(root / f"sys/bus/pci/devices/{address(number)}/numa_node", node)
    return root
