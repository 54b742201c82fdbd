"""Every kernel at every launch shape, compiled for cards that are not there: `pytest -m compile -s` prints what
each takes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline_compilation import CARDS, CASES

from fla.ops.attn.softpick import doctor_shapes, launch_shapes
from fla.ops.attn.softpick.decoding import MAX_ROWS
from fla.ops.attn.softpick.decoding_kernels import MAX_SKIPPING_ROWS

# timed, these cost less than the occupancy or the traffic of shapes that spill nothing: KERNELS.md section 4
SPILLS_OF_TIMED_SHAPES = {"sm_90": 8}
SCRIPT = Path(__file__).with_name("offline_compilation.py")


def compiled(card, *arguments):
    """Rows of `offline_compilation.py`, in a process that does not interpret."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, SCRIPT, card, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def columns(*cells):
    return "{:16} {:>7} {:>8} {:>3} {:>3} {:>9} {:>6} {:>7} {:>7}".format(*cells)


# KiB of shared memory of a multiprocessor
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx90a": 64, "gfx942": 64, "gfx950": 160}


def is_resident(card, row, shape):
    """Whether a multiprocessor holds as many programs at a time as decoding counts on."""
    # a warp's, or on one of AMD's four SIMDs a wave's, in steps of 8
    registers = -(-row["registers"] // 8) * 8
    if card.startswith("sm"):
        fits = registers * 32 * shape.num_warps * shape.programs <= 65536
    else:
        fits = registers * shape.num_warps // 4 * shape.programs <= 512
    # NVIDIA keeps 1 KiB of each program's for itself
    return fits and (row["shared"] + 1024) * shape.programs <= (SHARED[card] + 1) * 1024


@pytest.mark.compile
@pytest.mark.parametrize("card", CARDS)
def test_kernels_fit(card, capsys):
    rows = compiled(card)
    assert len(rows) == 6 * len(CASES)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{card}: K, V: head dimensions; tile: BT x BS; w: warps; st: stages; registers: per thread;\n"
            "spills: registers spilled; scratch: bytes of local memory per thread; shared: bytes of shared memory per program\n"
        )
        heads = "K, V", "kernel", "tile", "w", "st", "registers", "spills", "scratch", "shared"
        sys.stdout.write(columns(*heads) + "\n")
        for row in rows:
            kernel = row["kernel"].removeprefix("parallel_").removesuffix("_kernel")
            kernel = kernel.removeprefix("normalized_attn_")
            tile = f"{row['BT']}x{row['BS']}"
            line = columns(
                row["case"], kernel.removeprefix("bwd_kernel_"), tile, row["num_warps"],
                row["num_stages"] or "", row["registers"], row["spills"], row["scratch"], row["shared"],
            )  # fmt: skip
            sys.stdout.write(line + "\n")
    for row in rows:
        K, V, dtype, _, _ = CASES[row["case"]]
        assert row["shared"] <= CARDS[card].shared, row
        if row["kernel"] == "normalized_attn_decode_kernel":
            kind = row["case"].split()[-1].lower() if dtype == torch.float32 else "16bit"
            if ("decode", kind) not in launch_shapes.TABLE[card]:
                kind = "ieee"
            assert is_resident(
                card, row, launch_shapes.select_launch_shape(card, "decode", kind, K, V)
            ), row
        if max(K, V) <= 128:
            assert row["spills"] <= SPILLS_OF_TIMED_SHAPES.get(card, 0), row
            assert row["scratch"] == (4 * row["spills"] if card.startswith("sm") else 0), row
        if row["products_needed"] == 0:
            continue
        # 16 rows are too few for four warps, which then repeat each other; decoding waits for memory all the same
        is_repeated = row["kernel"] == "normalized_attn_decode_kernel"
        has_matrix_instructions = row["matrix_products"] != 0
        if dtype == torch.float32 and card.startswith("sm") and "IEEE" in row["case"]:
            # no tensor core of NVIDIA multiplies float32 in full
            assert not has_matrix_instructions, row
            continue
        assert has_matrix_instructions, row
        # tcgen05 does not say; the small tiles of unaligned rows and of TF32 at 256 do repeat
        is_repeated |= K % 16 != 0 or (K == 256 and "TF32" in row["case"])
        if row["matrix_products"] > 0 and not is_repeated:
            assert row["matrix_products"] == row["products_needed"], row


@pytest.mark.compile
@pytest.mark.parametrize("card", CARDS)
def test_decoding_compiles_for_every_number_of_rows(card, capsys):
    rows = compiled(card, "rows")
    for case, group in itertools.groupby(rows, lambda x: (x["D"], x["dtype"], x["has_all"])):
        group = list(group)
        assert sorted(n for x in group for n in x["rows"]) == list(range(1, MAX_ROWS + 1)), case
        with capsys.disabled():
            for x in group:
                sys.stdout.write(
                    f"{card:8} D {x['D']:3} {x['dtype']:8} {'all' if x['has_all'] else '':3} rows "
                    f"{x['rows'][0]:3}-{x['rows'][-1]:3} tile {x['BT']:3}x{x['BS']:2} registers {x['registers']:3} "
                    f"spills {x['spills']} shared {x['shared']}\n"
                )
    for x in rows:
        assert x["shared"] <= CARDS[card].shared, x
        # float32 in IEEE runs on no tensor core, and ptxas spills a few to fit one more program
        allowed = 8 if x["dtype"] == "float32" else SPILLS_OF_TIMED_SHAPES.get(card, 0)
        if x["D"] <= 128:
            assert x["spills"] <= allowed, x
        kernel = "decode" if x["BT"] <= 16 and x["rows"][0] <= MAX_SKIPPING_ROWS else "chunk"
        kind = "16bit" if x["dtype"] == "bfloat16" else "ieee"
        shape = launch_shapes.select_launch_shape(card, kernel, kind, x["D"], x["D"])
        assert is_resident(card, x, shape), x


@pytest.mark.compile
@pytest.mark.parametrize("card", [card for card in CARDS if card.startswith("gfx")])
def test_shapes_that_the_doctor_tries_fit(card):
    rows = compiled(card, "candidates")
    assert len(rows) == 2 * 3 * 4
    for row in rows:
        assert row["shared"] <= CARDS[card].shared, row
    shapes = itertools.chain(*doctor_shapes.CANDIDATES[card].values())
    asked = {getattr(shape, "waves_per_eu", None) for shape in shapes}
    assert {row["waves_per_eu"] for row in rows} == asked


@pytest.mark.compile
def test_sizes_do_not_recompile():
    # with pointers at 64, with descriptors at 128
    rows = compiled("sm_90", "compilations")
    assert [len(row) for row in rows] == [6, 6]
    assert all(count == 1 for row in rows for count in row.values()), rows


def test_every_launch_shape_is_compiled():
    kernels = "fwd", "delta", "dq", "dkv", "decode", "chunk"
    for shapes in launch_shapes.TABLE.values():
        kinds = {kind for _, kind in shapes}
        assert {(kernel, kind) for kernel in kernels for kind in kinds} == set(shapes)
        assert kinds - {"tf32"} == {"16bit", "ieee"}
    assert set(launch_shapes.TABLE) == set(CARDS)


def test_waves_are_asked_for_on_amd_alone(monkeypatch):
    for card, shapes in launch_shapes.TABLE.items():
        for shape in itertools.chain(*shapes.values()):
            unknown = "maxnreg" if card.startswith("gfx") else "waves_per_eu"
            assert getattr(shape, unknown, None) is None, (card, shape)
    q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    # the forward of gfx950 leaves the waves to the compiler
    for card, kernel, waves in ("gfx950", "dq", 2), ("gfx950", "fwd", None), ("sm_90", "dq", None):
        monkeypatch.setattr(launch_shapes, "architecture", lambda _, card=card: card)
        options = launch_shapes.launch_options(kernel, q, 128)
        assert options.get("waves_per_eu") == waves
        assert ("waves_per_eu" in options) == (waves is not None)


def test_unknown_architecture_is_refused(monkeypatch):
    class Target:
        backend = "hip"
        arch = "gfx1100"

    class Driver:
        def get_current_target(self):
            return Target

    monkeypatch.setattr(launch_shapes.knobs.runtime, "interpret", False)
    monkeypatch.setattr(launch_shapes.driver, "_active", Driver())
    with pytest.raises(ValueError, match="one of the architectures sm_80, .*got gfx1100"):
        launch_shapes.architecture(99)


@pytest.mark.parametrize(
    ("capability", "row"),
    [(80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (100, "sm_100"), (120, "sm_80")],
)
def test_row_of_a_capability(capability, row, monkeypatch):
    class Target:
        backend = "cuda"
        arch = capability

    class Driver:
        def get_current_target(self):
            return Target

    monkeypatch.setattr(launch_shapes.knobs.runtime, "interpret", False)
    monkeypatch.setattr(launch_shapes.driver, "_active", Driver())
    assert launch_shapes.architecture(100 + capability) == row


@pytest.mark.compile
def test_launch_shapes_for_other_capabilities_fit_them():
    # sm_86, sm_89 and sm_120 have 99 KB
    for row in compiled("sm_80"):
        assert row["shared"] <= 99 * 1024, row
