"""Prints which kernel serves which inputs on which card: ``python -m fla.ops.attn.softpick.kernel_table``. Needs no GPU."""

import sys
from collections.abc import Iterator

import torch

from fla.ops.attn.softpick import kernel_choice
from fla.ops.attn.softpick.hopper.launch import shape_of
from fla.ops.attn.softpick.launch_shapes import TABLE, select_launch_shape


def choices() -> Iterator[tuple[str, str, str, str, str, str]]:
    """Card, kernel, dtypes, head dimensions, whose kernel serves them, and its launch shape, for every column of `TABLE`."""
    columns = (
        ("64", 64), ("16, 32", 32), ("48", 48), ("128", 128), ("80, 96, 112", 96), ("up to 256", 256),
        ("no multiple of 16", 40),
    )  # fmt: skip
    for row, shapes in TABLE.items():
        for kernel, kind in shapes:
            dtype = torch.bfloat16 if kind == "16bit" else torch.float32
            name = "bfloat16, float16" if kind == "16bit" else f"float32, {kind}"
            for head, D in columns:
                whose = kernel_choice.serving_kernel(row, kernel, dtype, D, D)
                shape = select_launch_shape(row, kernel, kind, D, D)
                if whose == "Gluon":
                    shape = shape_of(kernel, D)
                yield row, kernel, name, head, whose, str(shape)


def main() -> None:
    """Prints `choices`."""
    for row, kernel, dtypes, head, whose, shape in choices():
        sys.stdout.write(f"{row:7} {kernel:6} {dtypes:17} {head:17} {whose:6} {shape}\n")
    sys.stdout.write(
        "\nGluon serves 16-bit calls with K = V and T = S from these lengths on (S, window_size, or the mean if packed):\n"
    )
    for (kind, direction), shortest in kernel_choice.SHORTEST.items():
        lengths = ", ".join(f"{length:,} at {D}" for D, length in shortest.items())
        sys.stdout.write(f"{kind:7} {direction:4} {lengths}\n")
    sys.stdout.write(
        "and with B * HQ * T * K times that length (dense: half of it) of at least "
        f"{kernel_choice.MIN_HOPPER_WORK:,},\n"
        f"if {kernel_choice.PROGRAM_ROWS} queries (bwd: keys) of a head at a time are enough work for all multiprocessors.\n"
        "Triton serves all others, such as packed sequences with a window.\n"
    )


if __name__ == "__main__":
    main()
