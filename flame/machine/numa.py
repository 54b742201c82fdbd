"""Which GPU sits next to which CPUs and memory, read from the kernel."""

from dataclasses import dataclass
from pathlib import Path

# root of /sys; tests replace it
ROOT = Path("/")


class TopologyError(Exception):
    """The topology cannot be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class Group:
    """The NUMA nodes of one socket."""

    name: str
    """A, B, ... in the order of the nodes."""
    nodes: frozenset[int]
    cpus: frozenset[int]


def parse_ranges(text: str) -> frozenset[int]:
    """The kernel's lists: "0-2,8" is {0, 1, 2, 8}."""
    numbers: set[int] = set()
    for piece in text.strip().split(","):
        if piece:
            first, _, last = piece.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def format_ranges(numbers: frozenset[int]) -> str:
    """The inverse of `parse_ranges`."""
    pieces: list[list[int]] = []
    for number in sorted(numbers):
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pieces)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise TopologyError(f"{path} cannot be read ({error.strerror})") from None


def groups() -> list[Group]:
    """The machine's sockets that have CPUs, each with its NUMA nodes.

    A group is a socket rather than a NUMA node, because AMD's NPS2 and NPS4 split a socket and its GPUs into several
    nodes. Where the kernel reports no socket, each node is a group.

    Raises:
        TopologyError: The nodes cannot be read.
    """
    system = ROOT / "sys/devices/system"
    if not (system / "node").is_dir():
        # a kernel without NUMA has no folder `node`; a machine without /sys has neither folder
        if not (system / "cpu").is_dir():
            raise TopologyError(f"{system}/node and {system}/cpu do not exist")
        return [Group("A", frozenset(), frozenset())]
    sockets: dict[tuple[str, int], list[tuple[int, frozenset[int]]]] = {}
    folders = (path for path in (system / "node").glob("node*") if path.name[4:].isdecimal())
    for folder in sorted(folders, key=lambda path: int(path.name[4:])):
        node, cpus = int(folder.name[4:]), parse_ranges(_read(folder / "cpulist"))
        # a node without CPUs has nothing to bind to
        if cpus:
            package = _package(min(cpus))
            key = ("node", node) if package < 0 else ("socket", package)
            sockets.setdefault(key, []).append((node, cpus))
    if not sockets:
        raise TopologyError(f"{system}/node has no NUMA node with CPUs")
    return [
        Group(
            chr(ord("A") + index),
            frozenset(node for node, _ in members),
            frozenset().union(*(cpus for _, cpus in members)),
        )
        for index, members in enumerate(sockets.values())
    ]


def _package(cpu: int) -> int:
    """Socket of a CPU; -1 if the kernel does not report it."""
    path = ROOT / f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"
    return int(_read(path)) if path.exists() else -1


def group_of(address: str, groups: list[Group]) -> Group:
    """The group whose CPUs and memory the GPU at a PCI ``address`` is attached to.

    Raises:
        TopologyError: The kernel does not say.
    """
    path = ROOT / "sys/bus/pci/devices" / address / "numa_node"
    node = int(_read(path))
    for group in groups:
        if node in group.nodes:
            return group
    raise TopologyError(f"{path} says {node}, which is not a NUMA node with CPUs")
