"""Which kernels serve which inputs on which card: those of Triton, or those for Hopper in Gluon.

The whole answer, without a GPU: ``python -m fla.ops.attn.softpick.kernel_choice``.
"""

import sys
from collections.abc import Iterator

import torch

from fla.ops.attn.softpick.hopper.launch import refusal_of_kind, select_forward_shape
from fla.ops.attn.softpick.launch_shapes import TABLE, select_launch_shape

# The kernels that exist for Hopper, and those of them that operators may choose. A kernel that is only in the first is
# written, simulated and compiled, and has not run on a card. It is enabled when it ran on one, was right and was faster.
WRITTEN_FOR_HOPPER = frozenset({"fwd", "dq", "dkv"})
ENABLED_ON_HOPPER: frozenset[str] = frozenset()


def serving_kernel(row: str, kernel: str, dtype: torch.dtype, K: int, V: int) -> str:
    """Whose kernel computes inputs of this kind: "Gluon", or "Triton".

    Args:
        row: Architecture, a key of `launch_shapes.TABLE`.
        kernel: "fwd", "dq", "dkv", "decode" or "chunk".
        dtype: Of queries, keys and values.
        K: Head dimension of queries and keys.
        V: Head dimension of values.
    """
    if kernel in ENABLED_ON_HOPPER and refusal_of_kind(kernel, row, dtype, K, V) is None:
        return "Gluon"
    return "Triton"


def choices() -> Iterator[tuple[str, str, str, str, str, str]]:
    """Card, kernel, dtypes, head dimensions, whose kernel serves them, and its launch shape, for every column of `TABLE`."""
    columns = ("up to 64", 64), ("up to 128", 128), ("up to 256", 256), ("no multiple of 16", 40)
    for row, shapes in TABLE.items():
        for kernel, kind in shapes:
            dtype = torch.bfloat16 if kind == "16bit" else torch.float32
            name = "bfloat16, float16" if kind == "16bit" else f"float32, {kind}"
            for head, D in columns:
                whose = serving_kernel(row, kernel, dtype, D, D)
                if whose == "Gluon":
                    shape = select_forward_shape(D, sys.maxsize)
                else:
                    shape = select_launch_shape(row, kernel, kind, D, D)
                yield row, kernel, name, head, whose, str(shape)


def main() -> None:
    """Prints `choices`."""
    for row, kernel, dtypes, head, whose, shape in choices():
        sys.stdout.write(f"{row:7} {kernel:6} {dtypes:17} {head:17} {whose:6} {shape}\n")
    disabled = ", ".join(sorted(WRITTEN_FOR_HOPPER - ENABLED_ON_HOPPER)) or "none"
    sys.stdout.write(f"written for Hopper in Gluon and not enabled: {disabled}\n")


if __name__ == "__main__":
    main()
