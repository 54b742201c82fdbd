"""The rules of a launch on GPUs: one NUMA group a run, at most four GPUs, each process next to its GPU."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.machine import kfd, list_gpus, numa
from flame.machine.numa import Group, TopologyError, format_ranges
from flame.machine.visible import CUDA, HIP, ROCR, describe_variables, visible_gpus

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
        allow_cross_numa: Skip the rules, that of whole GPUs too; if the topology cannot be read, do not bind.
        allowed_cpus: CPUs that the processes may use.
        env: Environment of the processes.
        argv: Flags of the run, for the command that an error proposes.

    Raises:
        UsageError: A rule is broken, or the topology cannot be read.
    """
    visible = visible_gpus(env, is_rocm=is_rocm)
    given = describe_variables(env, is_rocm=is_rocm)
    if not visible:
        return []
    if ngpu > len(visible):
        raise UsageError(
            f"NGPU={ngpu} must be at most the number of visible GPUs, {len(visible)} ({given})"
        )
    used = visible[:ngpu]
    # HIP prefers its own variable, so a command that sets it is right whatever selected these GPUs
    variable = HIP if is_rocm else CUDA
    if not allow_cross_numa:
        what = f"NGPU={ngpu} with {given}"
        require_whole_gpus(used, what, "give --job.allow_cross_numa", env)
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
    modes = {x: kfd.partition_modes(x)[0] for x in used}
    if cut := [f"{x} ({mode})" for x, mode in modes.items() if mode in kfd.PARTITIONED]:
        logger.warning(f"a process gets a partition, not a whole GPU, of {', '.join(cut)}")
    return [_bind_process(x, group_of[x], allowed_cpus) for x in used] if group_of else []


def require_whole_gpus(used: list[str], what: str, escape: str, env: Mapping[str, str]) -> None:
    """Raises UsageError if processes of a run would share a GPU, each on a partition of it.

    A GPU that a former user left in mode DPX, QPX or CPX shows as 2, 4 or 8, so the usual indices 0 to 3 would train
    on one GPU or two, slowly and unnoticed.

    Args:
        used: PCI addresses of the GPUs of the run, one for each process.
        what: What chose them, for the error.
        escape: What allows it, for the error.
        env: Environment of the run.
    """
    if len(set(used)) == len(used):
        return
    address = next(x for x in used if used.count(x) > 1)
    compute, memory = kfd.partition_modes(address)
    modes = f" (mode {compute}{f', {memory}' if memory else ''})" if compute else ""
    whole = "amd-smi set --gpu all --compute-partition SPX"
    if memory not in ("", "NPS1"):
        whole = f"amd-smi set --gpu all --memory-partition NPS1 and {whole}"
    every = _unselected(env)
    firsts = ",".join(str(every.index(x)) for x in dict.fromkeys(every))
    raise UsageError(
        f"{what} takes {len(used)} devices of {len(set(used))} GPU{'s' if len(set(used)) > 1 else ''}: "
        f"{used.count(address)} are partitions of the GPU at {address}{modes}. Make the GPUs whole again with {whole}, "
        f"choose one partition of each GPU with {HIP} (the first of each: {firsts}), or {escape} to train on partitions"
    )


def _unselected(env: Mapping[str, str]) -> list[str]:
    """Addresses of all GPUs that HIP_VISIBLE_DEVICES or CUDA_VISIBLE_DEVICES can select."""
    return list_gpus.addresses({x: value for x, value in env.items() if x not in (HIP, CUDA)})


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
    every = _unselected(env)
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
            # one partition of a GPU, if it has several
            numbers = [i for i in numbers if every.index(every[i]) == i]
            numbers = numbers[: min(len(used), MAX_GPUS)]
            # the numbers count what ROCR_VISIBLE_DEVICES leaves
            words = [f"{ROCR}={env[ROCR]}"] if variable == HIP and ROCR in env else []
            words += [f"{variable}={','.join(map(str, numbers))}"]
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
