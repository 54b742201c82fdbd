"""Tries launch shapes other than those of the table, for `doctor.py`: bfloat16, softpick, one kernel at a time.

On AMD the other shapes of forward, dq and dkv are the three best ranked without a card (`RANKED`). Those of decoding
and of NVIDIA cards are chosen by hand.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from fla.ops.attn.softpick import launch_shapes, parallel_bwd
from fla.ops.attn.softpick.decoding import normalized_attn_decode
from fla.ops.attn.softpick.doctor_speed import (
    DECODED,
    MAX_ERROR,
    TOKENS,
    draw,
    median_ms,
    relative_error,
)
from fla.ops.attn.softpick.launch_shapes import DecodeShape, KernelShape, LaunchShape
from fla.ops.attn.softpick.parallel_fwd import parallel_normalized_attn_fwd

if TYPE_CHECKING:
    from fla.ops.attn.softpick.doctor import Report

LENGTH = 4096
# a shape counts as faster from this ratio on; repeated medians differ by less
LEAST_GAIN = 1.03

# The launch shapes that `benchmarks/rank_amd.py --top 3` estimates to be the fastest that fit, with Triton 3.9.0 and LLVM
# 22.1.8; none was timed. A tile with its warps comes once, with its best waves_per_eu.
# (card, kernel, head dimension) -> (BT, BS, num_warps, num_stages, waves_per_eu or 0)
RANKED: dict[tuple[str, str, int], tuple[tuple[int, int, int, int, int], ...]] = {
    ("gfx90a", "fwd", 64): ((128, 64, 4, 1, 0), (128, 32, 4, 1, 0), (64, 64, 4, 1, 2)),
    ("gfx90a", "fwd", 128): ((64, 64, 4, 1, 2), (128, 64, 8, 1, 2), (128, 32, 4, 1, 0)),
    ("gfx90a", "dq", 64): ((128, 64, 4, 1, 1), (128, 32, 4, 1, 1), (64, 64, 4, 1, 1)),
    ("gfx90a", "dq", 128): ((128, 32, 4, 1, 0), (128, 64, 8, 1, 0), (128, 32, 8, 1, 0)),
    ("gfx90a", "dkv", 64): ((128, 64, 8, 1, 0), (128, 16, 4, 1, 1), (64, 64, 4, 1, 1)),
    ("gfx90a", "dkv", 128): ((128, 32, 8, 1, 2), (64, 16, 4, 1, 0), (64, 32, 4, 1, 0)),
    ("gfx942", "fwd", 64): ((128, 64, 4, 1, 0), (64, 64, 4, 1, 0), (128, 32, 4, 1, 2)),
    ("gfx942", "fwd", 128): ((128, 32, 4, 1, 1), (128, 64, 8, 1, 0), (64, 64, 4, 1, 0)),
    ("gfx942", "dq", 64): ((128, 32, 4, 1, 1), (64, 64, 4, 1, 2), (128, 64, 8, 1, 2)),
    ("gfx942", "dq", 128): ((128, 64, 8, 1, 2), (128, 16, 4, 1, 1), (128, 32, 8, 1, 2)),
    ("gfx942", "dkv", 64): ((64, 64, 4, 1, 1), (128, 32, 4, 1, 1), (128, 64, 8, 1, 0)),
    ("gfx942", "dkv", 128): ((128, 32, 8, 1, 2), (128, 64, 4, 1, 1), (128, 16, 8, 1, 2)),
    ("gfx950", "fwd", 64): ((128, 64, 8, 1, 0), (128, 64, 4, 1, 2), (64, 64, 4, 1, 0)),
    ("gfx950", "fwd", 128): ((128, 64, 8, 1, 2), (128, 32, 4, 1, 2), (64, 64, 4, 1, 0)),
    ("gfx950", "dq", 64): ((128, 64, 4, 1, 0), (128, 64, 8, 1, 2), (64, 64, 4, 1, 0)),
    ("gfx950", "dq", 128): ((128, 64, 8, 1, 2), (128, 32, 4, 1, 2), (64, 64, 4, 1, 2)),
    ("gfx950", "dkv", 64): ((128, 32, 4, 1, 1), (64, 64, 4, 1, 2), (128, 64, 8, 1, 2)),
    ("gfx950", "dkv", 128): ((128, 32, 8, 1, 2), (64, 32, 4, 1, 0), (128, 64, 4, 1, 0)),
}  # fmt: skip
# (kernel, head dimension) -> neighbours of the table's shape, chosen by hand: the ranking knows neither NVIDIA's cards
# nor decoding, which waits for memory.
_AMD_DECODING: dict[tuple[str, int], tuple[KernelShape, ...]] = {
    ("decode", 64): (
        DecodeShape(4, 16, 64, 4, 1),
        DecodeShape(3, 16, 32, 4, 1),
        DecodeShape(3, 16, 64, 2, 1),
    ),
    ("decode", 128): (
        DecodeShape(3, 16, 64, 4, 1),
        DecodeShape(2, 16, 32, 4, 1),
        DecodeShape(2, 16, 64, 2, 1),
    ),
}
_NVIDIA: dict[tuple[str, int], tuple[KernelShape, ...]] = {
    ("fwd", 64): (
        LaunchShape(128, 64, 8, 3),
        LaunchShape(64, 64, 4, 3),
        LaunchShape(128, 32, 4, 3),
    ),
    ("fwd", 128): (
        LaunchShape(128, 64, 8, 3),
        LaunchShape(64, 64, 4, 2),
        LaunchShape(64, 32, 4, 3),
    ),
    ("dq", 64): (LaunchShape(64, 64, 4, 3), LaunchShape(128, 64, 8, 2), LaunchShape(64, 32, 4, 3)),
    ("dq", 128): (LaunchShape(64, 64, 4, 2), LaunchShape(128, 64, 8, 2), LaunchShape(64, 32, 4, 3)),
    ("dkv", 64): (LaunchShape(64, 64, 4, 2), LaunchShape(64, 32, 4, 3), LaunchShape(128, 64, 8, 2)),
    ("dkv", 128): (LaunchShape(64, 64, 4, 2), LaunchShape(64, 32, 4, 3), LaunchShape(64, 32, 4, 2)),
    ("decode", 64): (
        DecodeShape(3, 16, 64, 4, 3),
        DecodeShape(4, 16, 32, 4, 3),
        DecodeShape(4, 16, 64, 4, 2),
    ),
    ("decode", 128): (
        DecodeShape(2, 16, 64, 4, 2),
        DecodeShape(2, 16, 32, 4, 3),
        DecodeShape(3, 16, 32, 4, 2),
    ),
}


def _candidates(entry: str) -> dict[tuple[str, int], tuple[KernelShape, ...]]:
    if entry.startswith("sm"):
        return _NVIDIA
    ranked = {
        (kernel, D): tuple(LaunchShape(*x[:4], waves_per_eu=x[4] or None) for x in rows)
        for (card, kernel, D), rows in RANKED.items()
        if card == entry
    }
    return ranked | _AMD_DECODING


# The shapes tried besides the table's: entry of `launch_shapes.TABLE` -> (kernel, head dimension) -> shapes
CANDIDATES = {entry: _candidates(entry) for entry in launch_shapes.TABLE}


class _Nothing:
    """Takes the position of a kernel that is not being timed."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def launching(kernel: str, D: int, shape: KernelShape) -> Iterator[None]:
    """The table of launch shapes has this shape for the kernel in bfloat16."""
    table = launch_shapes.TABLE[launch_shapes.architecture(0)]
    before = table[kernel, "16bit"]
    row = list(before)
    row[{64: 0, 128: 1}[D]] = shape
    table[kernel, "16bit"] = tuple(row)  # pyright: ignore[reportArgumentType]  # as long as it was
    try:
        yield
    finally:
        table[kernel, "16bit"] = before


@contextmanager
def backward_alone(kernel: str) -> Iterator[None]:
    """Backward launches this one of its kernels."""
    others: dict[str, Any] = {
        f"parallel_normalized_attn_bwd_kernel_{name}": _Nothing()
        for name in ("delta", "dq", "dkv")
        if name != kernel
    }
    with mock.patch.multiple(parallel_bwd, **others):
        yield


def launcher(kernel: str, T: int, D: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that runs the kernel and the others of the same call."""
    if kernel == "decode":
        q, k, v, _ = draw(DECODED, T, D, queries=1)
        lengths = torch.full((DECODED,), T, dtype=torch.int32, device="cuda")
        return lambda: (normalized_attn_decode(q, k, v, lengths),)  # pyright: ignore[reportReturnType]  # without return_lse the result is one tensor
    q, k, v, do = draw(max(1, TOKENS // T), T, D)
    common: dict[str, Any] = {
        "cu_seqlens": None,
        "scale": D**-0.5,
        "window_size": None,
        "head_first": False,
        "normalizer": "softpick",
    }

    def forward() -> tuple[torch.Tensor, ...]:
        return parallel_normalized_attn_fwd(q, k, v, sink_bias=None, safe=True, **common)

    if kernel == "fwd":
        return forward
    o, lse = forward()
    return lambda: parallel_bwd.parallel_normalized_attn_bwd(
        q, k, v, None, o=o, lse=lse, do=do, dlse=None, **common
    )


def time_shape(
    kernel: str,
    T: int,
    D: int,
    shape: KernelShape,
    f: Callable,
    expected: list[torch.Tensor],
    is_quick: bool,
) -> float | None:
    """Milliseconds of the kernel alone; None if the shape does not fit the card.

    Raises:
        RuntimeError: The results of the shape differ from those of the table's.
    """
    with launching(kernel, D, shape):
        try:
            got = f()
        except OutOfResources:
            return None
        for x, y in zip(got, expected, strict=True):
            error = relative_error(x, y)
            if not error <= MAX_ERROR:
                raise RuntimeError(f"wrong with this shape, relative error {error:.1e}: not timed")
        if kernel not in ("dq", "dkv"):
            return median_ms(f, is_quick)
        with backward_alone(kernel):
            return median_ms(f, is_quick)


def try_shapes(report: "Report", is_quick: bool) -> None:
    """Prints a line for each launch shape, and for each kernel whether the table's is the fastest."""
    T = 256 if is_quick else LENGTH
    entry = launch_shapes.architecture(0)
    report.begin(
        "shapes",
        f"Launch shapes, bfloat16, softpick, T {T}: milliseconds of one kernel, over the time of the table's shape",
    )
    for (kernel, D), candidates in CANDIDATES[entry].items():
        table = launch_shapes.select_launch_shape(entry, kernel, "16bit", D, D)
        label = f"{kernel:7}{D:4}"

        def table_results(kernel: str = kernel, D: int = D):
            f = launcher(kernel, T, D)
            return f, list(f())

        prepared = report.attempt(label, table_results)
        if prepared is None:
            continue
        f, expected = prepared
        times: dict[KernelShape, float] = {}
        for shape in dict.fromkeys((table, *candidates)):
            given = ", ".join(f"{name} {x}" for name, x in shape._asdict().items() if x)
            line = f"{label}  {'table' if shape == table else 'other'}  {given}"
            ms = report.attempt(
                line,
                lambda shape=shape, kernel=kernel, D=D, f=f, expected=expected: (
                    time_shape(kernel, T, D, shape, f, expected, is_quick),
                ),
            )
            if ms is None:
                continue
            if ms[0] is None:
                report.line(f"{line}  does not fit the card")
                continue
            times[shape] = ms[0]
            ratio = f"{ms[0] / times[table]:5.2f}" if table in times else "    -"
            report.line(f"{line}  {ms[0]:.3f} ms {ratio}")
        if table in times and len(times) > 1:
            report.line(f"{label}  {verdict(times, table)}")


def verdict(times: dict[KernelShape, float], table: KernelShape) -> str:
    """Says whether the shape of the table is the fastest."""
    best = min(times, key=lambda shape: times[shape])
    gain = times[table] / times[best]
    if gain < LEAST_GAIN:
        return f"the table's shape is the fastest of {len(times)}, within {LEAST_GAIN - 1:.0%}"
    return f"NOT the fastest: {tuple(best)} is {gain:.2f} times as fast as the table's"
