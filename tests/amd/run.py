"""Runs a launch: decodes each instruction once, and executes it for all waves that have reached it.

Waves that take different sides of a branch form groups. The group at the lowest address runs first, until it reaches the
next group. At a barrier a wave waits for all waves of the launch, not only for those of its workgroup.
"""

from collections.abc import Callable

import numpy as np
import torch

from amd import access, exchange, matrix, scalar, vector
from amd.decode import CodeObject, Instruction, decode
from amd.memory import AccessError, Local, Tensors
from amd.registers import Step, Waves

# Instructions that change timing, caches and priorities, none of which is modelled
_IGNORED = {
    "S_NOP", "S_WAITCNT", "S_SLEEP", "S_SETPRIO", "S_INST_PREFETCH", "BUFFER_WBL2", "BUFFER_INV", "V_NOP",
}  # fmt: skip
# of a group of waves between two meetings: enough for any kernel of the tests, reached within a minute
_MAX_BRANCHES = 100_000
_BUILDERS: dict[str, tuple[Callable[[Instruction], Step | None], ...]] = {
    "SMEM": (access.scalar_load,),
    "MUBUF": (access.buffer,),
    "GLOBAL": (access.global_memory,),
    "DS": (access.local_memory, exchange.permute),
    "VOP3P": (matrix.build, vector.build),
}


class UnknownInstructionError(Exception):
    """The emulator has no meaning for an instruction."""


class ExecutionError(Exception):
    """An instruction failed; the message names it."""


class Program:
    """A kernel's instructions, decoded when they are reached first."""

    def __init__(self, code: CodeObject, card: str):
        self.object, self.card = code, card
        self._steps: dict[int, tuple[Instruction, Step | None, int]] = {}

    def at(self, pc: int) -> tuple[Instruction, Step | None, int]:
        """The instruction at pc, what it does (None: it ends, waits or branches), and where the next one is."""
        if pc not in self._steps:
            try:
                op = decode(self.object.code, pc, self.card)
            except ValueError as e:
                raise UnknownInstructionError(f"{e} at byte {pc:#x}") from e
            self._steps[pc] = op, meaning(op), pc + op.size
        return self._steps[pc]

    def names(self) -> set[str]:
        """Of the instructions that were reached."""
        return {op.name for op, _, _ in self._steps.values()}


def meaning(op: Instruction) -> Step | None:
    """What the instruction does; None if it ends a wave, waits or branches."""
    if op.name in ("S_ENDPGM", "S_BARRIER") or op.name in scalar.BRANCHES:
        return None
    if op.name in _IGNORED:
        return lambda w: None
    kind = op.form.removesuffix("_LIT").removesuffix("_MFMA")
    builders = _BUILDERS.get(kind, (scalar.build if kind.startswith("S") else vector.build,))
    try:
        for build in builders:
            if (step := build(op)) is not None:
                return step
    except (AssertionError, NotImplementedError) as e:
        raise UnknownInstructionError(f"{op.name} with {e}: {op}") from e
    raise UnknownInstructionError(f"{op.name} has no meaning in the emulator: {op}")


def _advance(program: Program, w: Waves, stop: int) -> list[Waves]:
    """Runs waves until they diverge, reach stop, wait at a barrier or end.

    Returns the groups that go on; is_waiting is set on those at a barrier.
    """
    while w.pc != stop:
        op, step, following = program.at(w.pc)
        if step is not None:
            try:
                step(w)
            except (AccessError, AssertionError) as e:
                raise ExecutionError(f"{op}: {e}, workgroups {np.unique(w.workgroup)}") from e
            w.pc = following
            continue
        if op.name == "S_ENDPGM":
            return []
        if op.name == "S_BARRIER":
            w.pc, w.is_waiting = following, True
            return [w]
        w.num_branches += 1
        if w.num_branches > _MAX_BRANCHES:
            raise ExecutionError(f"{op}: the kernel does not end")
        taken = scalar.BRANCHES[op.name](w)
        target = scalar.branch_target(op)
        if taken.all():
            w.pc = target
        elif not taken.any():
            w.pc = following
        else:
            return [w.pick(taken, target), w.pick(~taken, following)]
        if w.pc > stop:
            break
    return [w]


def _joined(waves: list[Waves]) -> list[Waves]:
    """One group of waves for each instruction, the earliest first."""
    groups: dict[int, Waves] = {}
    for w in waves:
        groups[w.pc] = groups[w.pc].join(w) if w.pc in groups else w
    return [groups[pc] for pc in sorted(groups)]


def run(
    program: Program,
    tensors: Tensors,
    arguments: bytes,
    num_workgroups: int,
    waves_per_workgroup: int,
    local_size: int,
) -> None:
    """Runs the kernel on the tensors, whose addresses are in the arguments."""
    code = program.object
    assert not code.scratch, f"the kernel spills {code.scratch} bytes"
    data = torch.frombuffer(bytearray(arguments), dtype=torch.uint8)
    pointer, local = tensors.add("the arguments", data), Local(num_workgroups, local_size)
    with tensors, np.errstate(all="ignore"):
        w = Waves.start(num_workgroups, waves_per_workgroup, (tensors, local), code.entry)
        w.set_scalar(code.argument_register, np.uint64(pointer))
        w.set_scalar(code.user_registers, w.workgroup.astype(np.uint32))
        ready, waiting = [w], []
        while ready or waiting:
            if not ready:
                ready, waiting = waiting, []
                local.barrier()
                for x in ready:
                    x.is_waiting = False
            first, *rest = _joined(ready)
            for x in _advance(program, first, rest[0].pc if rest else 1 << 62):
                (waiting if x.is_waiting else rest).append(x)
            ready = rest
