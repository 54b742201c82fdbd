"""Slots for runs of a sweep that run at the same time: disjoint sets of GPUs, each within one NUMA group.

Small models may share a GPU: then several slots have the same one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from flame.base.errors import UsageError
from flame.machine import numa
from flame.machine.numa import TopologyError
from flame.machine.placement import require_whole_gpus
from flame.machine.visible import selecting_variable, visible_gpus


@dataclass(frozen=True, slots=True)
class Slot:
    """GPUs of one run, as the environment variables that select them."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the processes in the slot."""


# variables that a sweep sets for each run, or that would give two runs the same name
_PER_RUN_VARIABLES = (
    "NGPU",
    "NNODE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "WANDB_NAME",
    "WANDB_RUN_ID",
)


def refuse_per_run_variables(env: Mapping[str, str]) -> None:
    """Raises UsageError if one of `_PER_RUN_VARIABLES` is set."""
    for name in _PER_RUN_VARIABLES:
        if name in env:
            raise UsageError(
                f"{name}={env[name]} must be unset: a sweep runs on one machine, `ngpu` in [run] sets the GPUs of a "
                "run, and each run gets its own port and name"
            )


def find_slots(
    *,
    ngpu: int,
    parallel: bool,
    allow_cross_numa: bool,
    env: Mapping[str, str],
    runs_per_gpu: int = 1,
) -> list[Slot]:
    """The slots of ``ngpu`` GPUs each, as many as fit with ``parallel``, else one; a CPU machine is one slot.

    Slots that share a GPU are far apart in the list, so that runs spread over the GPUs first.

    Args:
        ngpu: GPUs per run.
        parallel: Whether several runs may run at the same time.
        allow_cross_numa: If the NUMA groups cannot be read, treat all GPUs as one group.
        env: Environment of the sweep, which decides the visible GPUs.
        runs_per_gpu: Slots of each GPU; above 1 it takes ``ngpu`` 1 and ``parallel``.

    Raises:
        UsageError: No group has ``ngpu`` visible GPUs, or the groups cannot be read.
    """
    visible = visible_gpus(env, is_rocm=torch.version.hip is not None)
    if not visible:
        return [Slot("the CPU")]
    variable, names = _names(len(visible), env)
    slots = []
    for group, members, cpus in _groups(visible, allow_cross_numa):
        chunks = [members[i : i + ngpu] for i in range(0, len(members) - len(members) % ngpu, ngpu)]
        # a single run uses all cores of its group; several runs of a group have to share them
        at_a_time = len(chunks) * runs_per_gpu
        threads = max(1, len(cpus) // (ngpu * at_a_time)) if parallel and at_a_time > 1 else None
        for chunk in chunks:
            if not allow_cross_numa:
                chosen = [visible[i] for i in chunk]
                escape = "set job.allow_cross_numa in [base]"
                require_whole_gpus(chosen, f"[run] ngpu = {ngpu}", escape, env)
            own = {variable: ",".join(names[i] for i in chunk)}
            if threads is not None and "OMP_NUM_THREADS" not in env:
                own["OMP_NUM_THREADS"] = str(threads)
            slots.append(Slot(f"group {group}, {variable}={own[variable]}", own))
    if not slots:
        counts = ", ".join(
            f"{len(members)} in group {group}"
            for group, members, _ in _groups(visible, allow_cross_numa)
        )
        raise UsageError(
            f"[run] ngpu must be at most the visible GPUs of one NUMA group, got {ngpu}: there are {counts}"
        )
    if runs_per_gpu > 1:
        slots = [
            replace(slot, name=f"{slot.name}, run {i} of {runs_per_gpu}")
            for i in range(1, runs_per_gpu + 1)
            for slot in slots
        ]
    return slots if parallel else slots[:1]


def _names(count: int, env: Mapping[str, str]) -> tuple[str, list[str]]:
    """The variable that selects GPUs, and the name of each of the ``count`` visible ones in it."""
    variable = selecting_variable(env, is_rocm=torch.version.hip is not None)
    if variable not in env:
        return variable, [str(i) for i in range(count)]
    return variable, [name for name in env[variable].split(",") if name]


def _groups(
    visible: list[str], allow_cross_numa: bool
) -> list[tuple[str, list[int], frozenset[int]]]:
    """Name, GPUs by their index among the visible ones, and usable CPUs of each group that has visible GPUs."""
    usable = frozenset(os.sched_getaffinity(0))
    every = list(range(len(visible)))
    try:
        groups = numa.groups()
        if len(groups) == 1:
            return [(groups[0].name, every, usable)]
        of = [numa.group_of(address, groups) for address in visible]
    except TopologyError as error:
        if allow_cross_numa:
            return [("unknown", every, usable)]
        raise UsageError(
            f"the NUMA groups of the GPUs are not known: {error}; job.allow_cross_numa in [base] runs without"
        ) from None
    found = []
    for group in groups:
        members = [i for i in every if of[i] == group]
        if members:
            found.append((group.name, members, group.cpus & usable))
    return found
