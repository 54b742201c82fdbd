"""A machine that is not there: the part of /sys and /dev that `flame.machine` reads, in a folder."""

from collections.abc import Collection, Mapping
from pathlib import Path

from flame.machine import placement

EIGHT = [0, 0, 0, 0, 1, 1, 1, 1]
TWO_SOCKETS = [(0, "0-47,96-143"), (1, "48-95,144-191")]
ALL_CPUS = frozenset(range(192))


def address(number: int) -> str:
    """PCI address of GPU ``number`` of the machine."""
    return f"0000:{number + 1:02x}:00.0"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def build(
    root: Path,
    *,
    nodes: list[tuple[int, str]],
    gpus: list[int],
    mode: tuple[str, str] = ("SPX", "NPS1"),
    shown: Collection[int] | None = None,
) -> Path:
    """A machine of ``nodes`` (socket, CPUs) and of AMD GPUs, each given by its NUMA node.

    ``mode`` is how each GPU is partitioned. A container shows the devices ``shown`` alone; their indices count
    partitions.
    """
    system = root / "sys/devices/system"
    topology = root / "sys/class/kfd/kfd/topology/nodes"
    for node, (socket, cpus) in enumerate(nodes):
        write(system / f"node/node{node}/cpulist", cpus)
        first = cpus.split(",")[0].split("-")[0]
        if first:
            write(system / f"cpu/cpu{first}/topology/physical_package_id", socket)
        write(topology / str(node) / "properties", "simd_count 0\ndrm_render_minor 0")
    for file in ("online", "possible"):
        write(system / "node" / file, f"0-{len(nodes) - 1}")
    if gpus:
        write(root / "dev/kfd", "")
    partitions = {"SPX": 1, "DPX": 2, "QPX": 4, "CPX": 8}[mode[0]]
    for number, node in enumerate(gpus):
        device = root / "sys/bus/pci/devices" / address(number)
        write(device / "numa_node", node)
        write(device / "current_compute_partition", mode[0])
        write(device / "current_memory_partition", mode[1])
        for index in range(number * partitions, (number + 1) * partitions):
            properties = topology / str(len(nodes) + index) / "properties"
            if shown is not None and index not in shown:
                # cannot be read, as in a container without the GPU's render device
                properties.mkdir(parents=True)
                continue
            write(root / f"dev/dri/renderD{128 + index}", "")
            location = (number + 1) << 8 | (index % partitions) << 28
            write(
                properties,
                f"simd_count {1216 // partitions}\nlocation_id {location}\ndomain 0\n"
                f"drm_render_minor {128 + index}\nnum_xcc {8 // partitions}\nunique_id {unique_id(index)}",
            )
    return root


def unique_id(index: int) -> int:
    """The number in the UUID of device ``index`` of the machine."""
    return 0xA000 + index


def hip(root: Path, env: Mapping[str, str], *, old: bool = False) -> list[str]:
    """Addresses of the devices that HIP sees in a process of that environment, in its order.

    ROCr counts the devices that the container shows, HIP what ROCR_VISIBLE_DEVICES leaves of them. HIP reads CUDA's
    variable if its own is unset. An ``old`` HIP takes empty variables for unset ones.
    """
    devices = []
    for folder in sorted(
        (root / "sys/class/kfd/kfd/topology/nodes").iterdir(), key=lambda x: int(x.name)
    ):
        if (folder / "properties").is_file():
            lines = (folder / "properties").read_text().splitlines()
            device = {name: int(value) for name, value in map(str.split, lines)}
            if (
                device["simd_count"]
                and (root / f"dev/dri/renderD{device['drm_render_minor']}").exists()
            ):
                devices.append(device)
    if not (root / "dev/kfd").exists():
        devices = []
    if "ROCR_VISIBLE_DEVICES" in env:
        devices = _select(devices, env["ROCR_VISIBLE_DEVICES"])
    selected = env.get("HIP_VISIBLE_DEVICES", env.get("CUDA_VISIBLE_DEVICES"))
    if old:
        selected = env.get("HIP_VISIBLE_DEVICES") or env.get("CUDA_VISIBLE_DEVICES") or None
    if selected is not None:
        devices = _select(devices, selected)
    return [address((device["location_id"] >> 8 & 0xFF) - 1) for device in devices]


def _select(devices: list[dict[str, int]], names: str) -> list[dict[str, int]]:
    """The devices that a variable names, by index or UUID, up to the first name that is none."""
    known = {str(i): device for i, device in enumerate(devices)}
    known |= {f"GPU-{device['unique_id']:016x}": device for device in devices}
    chosen = []
    for name in names.split(","):
        if name not in known:
            break
        if known[name] not in chosen:
            chosen.append(known[name])
    return chosen


def place(ngpu, visible=None, *, is_rocm=True, allow=False, cpus=ALL_CPUS, argv=(), **env):
    """The bindings of a launch with that environment; ``visible`` is the value of the runtime's variable."""
    if visible is not None:
        env["HIP_VISIBLE_DEVICES" if is_rocm else "CUDA_VISIBLE_DEVICES"] = visible
    return placement.bind_processes(
        ngpu=ngpu,
        is_rocm=is_rocm,
        allow_cross_numa=allow,
        allowed_cpus=cpus,
        env=env,
        argv=list(argv),
    )


def numbers(places):
    """GPU and group of each process."""
    return [(int(p.address[5:7], 16) - 1, p.group.name) for p in places]
