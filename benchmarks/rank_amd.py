"""Ranks launch shapes on an AMD card that is not there: python benchmarks/rank_amd.py --card gfx942 --kernel dkv --head-dim 128

Compiles one kernel offline at every candidate shape, takes the inner loop over tiles without a mask, and prints its
costs for 64 x 64 scores, best first. `--check` compares its order with shapes that were tuned on hardware, `--top`
prints rows of `doctor_shapes.RANKED`. Needs llvm-mca, which models all three cards (Debian's package llvm-22);
`amd_loops.py` counts.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from amd_loops import (
    RATES,
    LoopError,
    ShapeCost,
    loop_cost,
    matrix_loop,
    mca_clocks,
    mca_version,
    resident_waves,
    shape_cost,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("rank_amd.py: Triton compiles nothing while TRITON_INTERPRET is 1; unset it")
    import upstream_packages

    upstream_packages.skip()

import torch
import triton
from kernel_resources import Resources, resources
from offline_compilation import CARDS, compiled_launches
from plain_attention import launch as plain_launch

from fla.ops.attn.softpick import launch_shapes, parallel_bwd, parallel_fwd
from fla.ops.attn.softpick.launch_shapes import LaunchShape
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS

LEGEND = """Clocks of a compute unit for 64 x 64 scores, in the loop over tiles without a mask.
    matrix, vector, LDS   clocks that the unit needs at least; bank conflicts are left out
    mca                   clocks of a SIMD's waves one after another, each alone, by llvm-mca
    waves                 waves that a SIMD holds, by registers and local memory
    estimate              max(mca / min(waves, 2), matrix, vector, LDS)
    spills                registers that the whole kernel spills; such shapes come last
Assumed: two waves of a SIMD hide each other's waits in full and more hide nothing else; memory answers in the time of
LLVM's model. Trust the order where estimates differ by more than 1.1, not their size."""
MARGIN = 1.1
COLUMN = {64: 0, 128: 1, 256: 2}
# multiplications of a score, in head dimensions
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


class Candidate(NamedTuple):
    """A launch shape with the compiler's options that `LaunchShape` does not carry."""

    shape: LaunchShape
    kpack: int = 1
    nonkdim: int = 16

    def __str__(self) -> str:
        BT, BS, num_warps, num_stages = self.shape[:4]
        text = f"{BT} x {BS}, {num_warps} warps, waves_per_eu {self.shape.waves_per_eu or '-'}"
        for name, value, usual in (
            ("stages", num_stages, 1),
            ("kpack", self.kpack, 1),
            ("instructions", self.nonkdim, 16),
        ):
            text += "" if value == usual else f", {name} {value}"
        return text


class Case(NamedTuple):
    card: str
    kernel: str
    D: int
    dtype: str = "bfloat16"
    # None: not ours but a kernel of `plain_attention.py`
    normalizer: str | None = "softpick"


class Ranked(NamedTuple):
    candidate: Candidate
    resources: Resources
    cost: ShapeCost

    @property
    def fits(self) -> bool:
        return self.resources.scratch == 0 and self.cost.waves > 0


class NoKernel:
    """Stands in for a kernel that is not asked for."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def table_shape(case: Case) -> LaunchShape:
    return launch_shapes.TABLE[case.card][case.kernel, "16bit"][COLUMN[case.D]]


def compiled(case: Case, candidate: Candidate):
    """The compiled kernel."""
    extra = {"matrix_instr_nonkdim": candidate.nonkdim}
    if candidate.kpack != 1:
        extra["kpack"] = candidate.kpack
    if case.normalizer is None:
        preloads = case.card == "gfx950"
        launch = partial(plain_launch, case.kernel, case.D, candidate.shape, preloads, **extra)
        return compiled_launches(CARDS[case.card], launch)[0].kernel

    q = torch.empty(1, 256, 4, case.D, dtype=getattr(torch, case.dtype))
    common = {"cu_seqlens": None, "scale": 1.0, "window_size": None, "head_first": False}
    common["normalizer"] = case.normalizer
    lse = torch.empty(1, 4, 256)

    def options(kernel, q, V):
        return launch_shapes.launch_options(kernel, q, V) | extra

    def launch():
        if case.kernel == "fwd":
            parallel_fwd.parallel_normalized_attn_fwd(q, q, q, None, safe=True, **common)
            return
        others = {
            f"parallel_normalized_attn_bwd_kernel_{name}": NoKernel()
            for name in ("delta", "dq", "dkv")
            if name != case.kernel
        }
        with mock.patch.multiple(parallel_bwd, **others):
            parallel_bwd.parallel_normalized_attn_bwd(
                q, q, q, None, o=q, lse=lse, do=q, dlse=None, **common
            )

    shapes = list(launch_shapes.TABLE[case.card][case.kernel, "16bit"])
    shapes[COLUMN[case.D]] = candidate.shape
    with (
        mock.patch.dict(launch_shapes.TABLE[case.card], {(case.kernel, "16bit"): tuple(shapes)}),
        mock.patch.object(parallel_fwd, "launch_options", options),
        mock.patch.object(parallel_bwd, "launch_options", options),
    ):
        (found,) = compiled_launches(CARDS[case.card], launch)
    return found.kernel


def measured(case: Case, candidate: Candidate) -> Ranked:
    """What a shape costs.

    Raises:
        LoopError: Its loop cannot be measured.
    """
    kernel = compiled(case, candidate)
    BT, BS, num_warps = candidate.shape[:3]
    taken = resources(kernel)
    body = matrix_loop(kernel.asm["amdgcn"])
    waves = resident_waves(case.card, taken.registers, taken.shared, num_warps)
    cost = shape_cost(
        loop_cost(body, case.card),
        mca_clocks(body, case.card),
        case.card,
        (BT, BS),
        num_warps,
        PRODUCTS[case.kernel] * case.D,
        waves,
    )
    return Ranked(candidate, taken, cost)


def ranked(case: Case, candidates: list[Candidate]) -> Iterator[Ranked]:
    """The shapes that compile, in the order given; says on standard error which do not, and why."""
    for candidate in dict.fromkeys(candidates):
        try:
            yield measured(case, candidate)
        except LoopError as error:
            print(f"left out: {candidate}: {error}", file=sys.stderr)


def order(found: list[Ranked]) -> list[Ranked]:
    """Best first, of equal estimates the least time of mca; shapes that spill or fit no compute unit last."""
    return sorted(found, key=lambda x: (not x.fits, x.cost.estimate, x.cost.serial))


def print_table(found: list[Ranked], marked: Candidate, mark: str) -> None:
    print(
        f"{'estimate':>8} {'ratio':>5} {'matrix':>6} {'vector':>6} {'LDS':>5} {'mca':>6} {'waves':>5} {'registers':>9} "
        f"{'spills':>6} {'shared':>6}  shape"
    )
    for x in found:
        note = f"  <- {mark}" if x.candidate == marked else ""
        if not x.fits:
            note += "  spills" if x.resources.scratch else "  fits no compute unit"
        if x.cost.repeats > 1.001:
            note += f"  repeats products {x.cost.repeats:.1f} times"
        print(
            f"{x.cost.estimate:8.0f} {x.cost.estimate / found[0].cost.estimate:5.2f} {x.cost.matrix:6.0f} "
            f"{x.cost.vector:6.0f} {x.cost.lds:5.0f} {x.cost.serial:6.0f} {x.cost.waves:5g} "
            f"{x.resources.registers:9} {x.resources.spills:6} {x.resources.shared:6}  {x.candidate}{note}"
        )
    sys.stdout.flush()


def top_row(case: Case, found: list[Ranked], count: int) -> str:
    """A row of `doctor_shapes.RANKED`: the best shapes that fit, each of another tile or number of warps."""
    best = {}
    for shape in (x.candidate.shape for x in found if x.fits):
        best.setdefault(shape[:3], (*shape[:4], shape.waves_per_eu or 0))
    shapes = ", ".join(map(str, list(best.values())[:count]))
    return f'    ("{case.card}", "{case.kernel}", {case.D}): ({shapes}),'


def _shapes(*rows: tuple[int, ...]) -> list[Candidate]:
    """Candidates from BT, BS, warps, waves_per_eu (0: not given), stages."""
    return [Candidate(LaunchShape(*x[:3], x[4], waves_per_eu=x[3] or None)) for x in rows]


class KnownOrder(NamedTuple):
    """A shape that was tuned on hardware, and shapes that it must not lose to."""

    source: str
    case: Case
    chosen: Candidate
    losing: list[Candidate]


def known_orders() -> list[KnownOrder]:
    # aiter's files are aiter/ops/triton/configs/gfx942-MHA-DEFAULT.json and gfx950-MHA-DEFAULT.json
    narrow, wide, eight = _shapes((128, 64, 4, 2, 1), (128, 32, 4, 1, 1), (128, 64, 8, 1, 1))
    orders = []
    for card in "gfx942", "gfx950":
        orders += [
            KnownOrder(
                "aiter, forward", Case(card, "fwd", 128, normalizer=None), narrow,
                _shapes((64, 64, 4, 2, 1), (128, 32, 4, 2, 1), (128, 128, 4, 2, 1), (128, 64, 4, 1, 1), (256, 64, 4, 1, 1)),
            ),
            KnownOrder(
                "flash-attention's default on AMD, among 8 warps", Case(card, "fwd", 128, normalizer=None), eight,
                _shapes((64, 64, 8, 1, 1), (128, 32, 8, 1, 1), (128, 128, 8, 1, 1), (256, 64, 8, 1, 1)),
            ),
            KnownOrder(
                "aiter, dkv, among 4 warps", Case(card, "dkv", 128, normalizer=None), wide,
                _shapes((64, 16, 4, 1, 1), (64, 32, 4, 1, 1), (64, 64, 4, 1, 1), (128, 16, 4, 1, 1), (128, 64, 4, 1, 1)),
            ),
            KnownOrder(
                "aiter, dq, among 4 warps; one kernel with its dkv, whose warps and waves it takes", Case(card, "dq", 128, normalizer=None), wide,
                _shapes((64, 32, 4, 1, 1), (64, 64, 4, 1, 1), (128, 64, 4, 1, 1)),
            ),
            KnownOrder(
                "aiter#4162: more stages than one do not help", Case(card, "fwd", 128, normalizer=None), narrow,
                _shapes((128, 64, 4, 2, 2), (128, 64, 4, 2, 3)),
            ),
            KnownOrder(
                "aiter#3419: many waves_per_eu harm", Case(card, "fwd", 128, normalizer=None), narrow,
                _shapes((128, 64, 4, 4, 1), (128, 64, 4, 6, 1)),
            ),
        ]  # fmt: skip
    return orders


def check(cards: list[str]) -> None:
    """Prints the estimates for each known order, then where the two do not agree."""
    verdicts = []
    for known in known_orders():
        if known.case.card not in cards:
            continue
        found = order(list(ranked(known.case, [known.chosen, *known.losing])))
        print(f"\n{known.case.card} {known.case.kernel}, D {known.case.D}: {known.source}")
        print_table(found, known.chosen, "tuned on hardware")
        (chosen,) = (x for x in found if x.candidate == known.chosen)
        ratio = chosen.cost.estimate / found[0].cost.estimate
        verdict = "agrees" if chosen is found[0] else f"agrees within {ratio:.2f}"
        if ratio > MARGIN or (found[0].fits and not chosen.fits):
            verdict = f"does not agree: {found[0].candidate} is estimated {ratio:.2f} times as fast"
        if not chosen.fits:
            verdict += "; the tuned shape spills with this Triton"
        verdicts.append(f"{known.case.card} {known.case.kernel}: {known.source}: {verdict}")
    print("\n" + "\n".join(verdicts))


def candidates_of(args: argparse.Namespace) -> list[Candidate]:
    return [
        Candidate(LaunchShape(*tile, warps, stages, waves_per_eu=waves or None), kpack, nonkdim)
        for tile, warps, stages, waves, kpack, nonkdim in itertools.product(
            args.tiles, args.warps, args.stages, args.waves_per_eu, args.kpack, args.nonkdim
        )
        # fewer rows than an instruction has make waves repeat each other's products
        if tile[0] >= nonkdim * warps
    ]


def power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise ValueError
    return number


def tile(text: str) -> tuple[int, int]:
    BT, BS = map(power_of_two, text.split("x"))
    if min(BT, BS) < 16:
        raise ValueError
    return BT, BS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def many(name, **options):
        parser.add_argument(f"--{name}", nargs="+", **options)

    tiles = ["64x16", "64x32", "64x64", "128x16", "128x32", "128x64"]
    many("card", choices=RATES, default=list(RATES))
    many("kernel", choices=PRODUCTS, default=list(PRODUCTS))
    many("head-dim", type=int, choices=COLUMN, default=[64, 128])
    many("tiles", type=tile, default=list(map(tile, tiles)), help="BTxBS, powers of two from 16 on")
    many("warps", type=power_of_two, default=[4, 8])
    many("stages", type=int, choices=range(1, 6), default=[1])
    many("waves-per-eu", type=int, choices=range(9), default=[0, 1, 2], help="0: not given")
    many("kpack", type=int, choices=(1, 2), default=[1], help="2 only on gfx90a and gfx942")
    many("nonkdim", type=int, choices=(16, 32), default=[16], help="size of matrix instructions")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--normalizer", choices=KERNEL_NORMALIZERS, default="softpick")
    parser.add_argument(
        "--check", action="store_true", help="compare with shapes tuned on hardware"
    )
    parser.add_argument(
        "--top",
        type=int,
        choices=range(2, 10),
        help="print that many shapes of each kernel as rows of doctor_shapes.RANKED instead",
    )
    args = parser.parse_args()
    if args.top and (args.kpack != [1] or args.nonkdim != [16]):
        sys.exit("rank_amd.py: the launch shapes of --top carry neither --kpack nor --nonkdim")
    try:
        version = mca_version()
        for card in args.card:
            mca_clocks(["\ts_nop 0"], card)
    except LoopError as error:
        sys.exit(f"rank_amd.py: {error}")
    if args.kpack != [1] and "gfx950" in args.card:
        sys.exit("rank_amd.py: Triton ignores --kpack on gfx950")
    print(f"# Triton {triton.__version__}, {version}")
    if not args.top:
        print(LEGEND)
    if args.check:
        check(args.card)
        return
    for card, kernel, D in itertools.product(args.card, args.kernel, args.head_dim):
        case = Case(card, kernel, D, args.dtype, args.normalizer)
        now = Candidate(table_shape(case))
        found = order(list(ranked(case, [now, *candidates_of(args)])))
        if args.top:
            print(top_row(case, found, args.top), flush=True)
            continue
        print(f"\n{card} {kernel}, D {D}, {args.dtype}, {args.normalizer}")
        print_table(found, now, "the table's")


if __name__ == "__main__":
    main()
