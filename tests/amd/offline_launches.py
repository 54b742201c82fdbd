"""Lets the project's launchers launch on a card that is not there: kernels compile for it and run in the emulator.

Tensors are those of the CPU. Not in a process that interprets kernels, since such a one cannot compile them.
"""

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from offline_compilation import CARDS, OfflineDriver
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from amd.decode import load
from amd.memory import Tensors
from amd.run import Program, run
from fla.ops.attn.softpick import decoding_kernels, launch_shapes, parallel

_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f"}


def _scalars_and_pointers(kind, value) -> Iterator[tuple[str, object]]:
    """The kinds and values of an argument, one by one if it is a tuple; what is compiled in is left out."""
    if isinstance(kind, tuple):
        for pair in zip(kind, value, strict=True):
            yield from _scalars_and_pointers(*pair)
    elif kind != "constexpr":
        yield kind, value


def _arguments(signature: dict, values: dict[str, object], tensors: Tensors) -> bytes:
    """The kernel's arguments as it finds them in memory, two pointers after them."""
    data = b""
    for name, whole in signature.items():
        for kind, value in _scalars_and_pointers(whole, values[name]):
            if kind.startswith("*"):
                assert isinstance(value, torch.Tensor), name
                value, form = tensors.add(name, value), "Q"
            else:
                form = _FORMATS[kind]
            size = struct.calcsize(form)
            data += bytes(-len(data) % size) + struct.pack("<" + form, value)
    # of memory that Triton gives to kernels that ask for it, which ours do not
    return data + bytes(-len(data) % 8) + bytes(16)


def _check_names(program: Program, listing: str) -> None:
    """Raises AssertionError if the decoder gave an instruction a name that the assembler's listing does not have."""
    # names in the listing have the encoding at the end, and underscores differ
    listed = {x.upper().replace("_", "") for x in re.findall(r"^\t([a-z]\w+)", listing, re.M)}
    for name in program.names():
        short = name.replace("_", "")
        assert any(x.startswith(short) for x in listed), f"{name} is not in the listing"


@contextmanager
def emulated(card: str, change: Callable[[bytes], bytes] = bytes) -> Iterator[list[str]]:
    """While it lasts launches run in the emulator; gives the names of the kernels that were launched.

    change: of the machine code, before it runs.
    """
    launched: list[str] = []
    programs: dict[int, Program] = {}

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            if kernel.__name__ not in launched:
                # Triton keeps what it compiled for a device of this number, here for another card
                kernel.device_caches.clear()
            binary = kernel.warmup(*args, grid=grid, **kwargs)
            name = binary.metadata.name
            if id(binary) not in programs:
                code = load(binary.asm["hsaco"])
                code = dataclasses.replace(code, code=change(code.code))
                programs[id(binary)] = Program(code, card)
            program, tensors = programs[id(binary)], Tensors()
            values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            data = _arguments(binary.src.signature, values, tensors)
            assert len(data) >= program.object.arguments_size, (len(data), program.object)
            launched.append(name)
            run(program, tensors, data, grid[0], binary.metadata.num_warps, binary.metadata.shared)
            _check_names(program, binary.asm["amdgcn"])
            return binary

        return launch

    launch_shapes.architecture.cache_clear()
    with (
        mock.patch.object(driver, "_active", OfflineDriver(CARDS[card].target)),
        mock.patch.object(KernelInterface, "__getitem__", getitem),
        # few, so that decoding splits short sequences too
        mock.patch.object(decoding_kernels, "num_processors", return_value=4),
        mock.patch.object(parallel, "IS_INTERPRETED", True),
    ):
        yield launched
    launch_shapes.architecture.cache_clear()
