"""The rules of a launch on GPUs: one NUMA group a run, at most four GPUs, each process next to its GPU."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.machine import list_gpus, numa
from flame.machine.numa import Group, TopologyError, format_ranges

# a run leaves the other half of an 8-GPU machine to another one (AGENTS.md, section 5)
MAX_GPUS = 4


@dataclass(frozen=True, slots=True)
class ProcessBinding:
    """GPU and CPUs of one process of the run."""

    address: str
    """PCI address of its GPU."""
    group: Group
    cpus: frozenset[int]
    """CPUs of the group that the process may use."""


def bind_processes(
    *,
    ngpu: int,
    is_rocm: bool,
    allow_cross_numa: bool,
    allowed_cpus: frozenset[int],
    env: Mapping[str, str],
    argv: list[str],
) -> list[ProcessBinding]:
    """The bindings of ``ngpu`` processes on this machine; empty without a GPU, or if the machine is one group.

    Args:
        ngpu: Processes, which take the first visible GPUs.
        is_rocm: Whether HIP counts the GPUs.
        allow_cross_numa: Skip the rules; if the topology cannot be read, do not bind.
        allowed_cpus: CPUs that the processes may use.
        env: Environment of the processes.
        argv: Flags of the run, for the command that an error proposes.

    Raises:
        UsageError: A rule is broken, or the topology cannot be read.
    """
    visible = list_gpus.addresses(env)
    names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    variable = names[1] if is_rocm else names[2]
    masks = {name: env[name] for name in (names if is_rocm else names[2:]) if name in env}
    given = ", ".join(f"{name}={mask}" for name, mask in masks.items()) or f"no {variable}"
    if not visible:
        # these values hide all GPUs from a run that is meant for the CPU; NoDevFiles is Slurm's
        if masks and not {"", "-1", "NoDevFiles"} & set(masks.values()):
            counted = (
                "; HIP counts from 0 what ROCR_VISIBLE_DEVICES leaves" if len(masks) > 1 else ""
            )
            raise UsageError(
                f"torch sees no GPU with {given}{counted}: name GPUs of this machine, or set {variable}= to nothing "
                "to train on the CPU"
            )
        return []
    if ngpu > len(visible):
        raise UsageError(
            f"NGPU={ngpu} must be at most the number of visible GPUs, {len(visible)} ({given})"
        )
    used = visible[:ngpu]
    try:
        groups = numa.groups()
        group_of = {} if len(groups) == 1 else {x: numa.group_of(x, groups) for x in used}
    except TopologyError as error:
        if allow_cross_numa:
            logger.info(f"processes are not bound, since the NUMA groups are not known: {error}")
            return []
        raise UsageError(
            f"the NUMA groups of the GPUs are not known: {error}; "
            "--job.allow_cross_numa runs without this check and unbound"
        ) from None
    if not allow_cross_numa:
        if len(set(group_of.values())) > 1:
            raise UsageError(
                f"NGPU={ngpu} with {given} mixes NUMA groups: "
                f"{_proposal(used, groups, variable, env, argv)}; or give --job.allow_cross_numa to mix them"
            )
        if ngpu > MAX_GPUS:
            raise UsageError(
                f"NGPU={ngpu} must be at most {MAX_GPUS}, the GPUs of one machine that a run may take, "
                "unless --job.allow_cross_numa is given"
            )
    return [_bind_process(x, group_of[x], allowed_cpus) for x in used] if group_of else []


def _bind_process(address: str, group: Group, allowed_cpus: frozenset[int]) -> ProcessBinding:
    cpus = group.cpus & allowed_cpus
    if not cpus:
        raise UsageError(
            f"the GPU at {address} is in group {group.name} with CPUs {format_ranges(group.cpus)}, but this "
            f"process may only use CPUs {format_ranges(allowed_cpus)} (taskset, cgroup, Slurm): start it with "
            "CPUs of the group"
        )
    return ProcessBinding(address, group, cpus)


def _proposal(
    used: list[str],
    groups: list[Group],
    variable: str,
    env: Mapping[str, str],
    argv: list[str],
) -> str:
    """The group of each GPU, and the commands that obey the rules, with GPUs numbered as in ``variable``."""
    masks = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    every = list_gpus.addresses({name: value for name, value in env.items() if name not in masks})
    found, commands = [], []
    for group in groups:
        try:
            numbers = [i for i, x in enumerate(every) if numa.group_of(x, groups) == group]
        except TopologyError as error:
            raise UsageError(f"the NUMA groups of the GPUs are not known: {error}") from None
        own = [i for i in numbers if every[i] in used]
        if own:
            found.append(
                f"GPU {_ranges(own)} in group {group.name} "
                f"(GPU {_ranges(numbers)}, NUMA node {format_ranges(group.nodes)})"
            )
            numbers = numbers[: min(len(used), MAX_GPUS)]
            words = [f"{variable}={','.join(map(str, numbers))}"]
            words += [f"MASTER_PORT={env['MASTER_PORT']}"] if "MASTER_PORT" in env else []
            words += [f"NGPU={len(numbers)}", "bash train.sh", *map(shlex.quote, argv)]
            commands.append(" ".join(words))
    return f"{', '.join(found)}; run {' or '.join(commands)}"


def _ranges(numbers: list[int]) -> str:
    return format_ranges(frozenset(numbers))


def describe(bindings: list[ProcessBinding]) -> list[str]:
    """A line for each group that the run uses."""
    lines = []
    for group in dict.fromkeys(binding.group for binding in bindings):
        own = [binding for binding in bindings if binding.group == group]
        lines.append(
            f"group {group.name}: {' '.join(binding.address for binding in own)}, bound to NUMA node "
            f"{format_ranges(group.nodes)}, CPUs {format_ranges(own[0].cpus)}"
        )
    return lines


def threads(bindings: list[ProcessBinding]) -> int:
    """Threads for each process, so that all together fill the CPUs of their groups and no more."""
    groups = [binding.group for binding in bindings]
    return min(max(1, len(binding.cpus) // groups.count(binding.group)) for binding in bindings)


def to_json(bindings: list[ProcessBinding]) -> str:
    """The argument of `flame.machine.bind_and_train`: CPUs and NUMA nodes for each local rank."""
    return json.dumps(
        [
            {"cpus": format_ranges(binding.cpus), "nodes": format_ranges(binding.group.nodes)}
            for binding in bindings
        ]
    )
