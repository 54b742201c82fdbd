"""benchmarks/amd_loops.py: which loop of the assembly is measured, and what its instructions cost; rank_amd.py: its rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import amd_loops
import rank_amd

# an outer loop; in it one without matrix instructions, then the loop over tiles, then one more
ASSEMBLY = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tv_mov_b32_e32 v0, 0
.LBB0_2:                                ; Parent Loop BB0_1 Depth=1
\tv_add_u32_e32 v1, v1, v2
\ts_cbranch_scc1 .LBB0_2
.LBB0_3:                                ; =>  This Inner Loop Header: Depth=2
; %bb.4:
\tbuffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen
\ts_waitcnt vmcnt(0)                     ; a comment with v_exp_f32
\tds_write_b128 v5, v[0:3]
\ts_barrier
\tds_read2_b64 v[8:11], v6 offset1:16
\tds_bpermute_b32 v12, v7, v12
\tv_mfma_f32_16x16x16_bf16 v[16:19], v[8:9], v[10:11], v[16:19]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[8:9], v[10:11], a[0:15]
\tv_exp_f32_e32 v20, v16
\tv_pk_mul_f32 v[20:21], v[20:21], v[22:23]
\tv_cmp_lt_i32_e32 vcc, v1, v2
\ts_cbranch_vccnz .LBB0_5
\tv_mov_b32_e32 v20, 0
.LBB0_5:
\ts_cbranch_scc0 .LBB0_3
.LBB0_6:
\tv_mfma_f32_16x16x16_bf16 v[16:19], v[8:9], v[10:11], v[16:19]
\ts_cbranch_scc0 .LBB0_6
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def names(body):
    return [x.split()[0] for x in body]


def test_the_innermost_loop_with_matrix_instructions_is_found():
    body = amd_loops.matrix_loop(ASSEMBLY)
    assert names(body)[0] == "buffer_load_dwordx4"
    assert names(body)[-1] == "s_cbranch_scc0"
    assert len(body) == 14
    assert sum(x.startswith("v_mfma") for x in names(body)) == 2
    assert "v_exp_f32" not in body[1]


def test_assembly_without_such_a_loop_is_refused():
    straight = ASSEMBLY.replace("s_cbranch", "s_nop")
    with pytest.raises(amd_loops.LoopError, match="no loop with a matrix instruction"):
        amd_loops.matrix_loop(straight)


def test_counts():
    cost = amd_loops.loop_cost(amd_loops.matrix_loop(ASSEMBLY), "gfx942")
    assert cost.products == 16**3 + 32 * 32 * 8
    # 256 a clock
    assert cost.matrix_clocks == 16 + 32
    # exp takes four times as long as the two other vector instructions and the move
    assert (cost.vector_instructions, cost.vector_clocks) == (4, 16 + 3 * 4)
    assert cost.lds_written == 64 * 16
    # two reads of 8 bytes, and a permutation
    assert cost.lds_read == 64 * (2 * 8 + 4)
    assert cost.memory_instructions == 1


@pytest.mark.parametrize(
    ("card", "instruction", "clocks"),
    [
        ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 32),
        ("gfx90a", "v_mfma_f32_32x32x8f16", 64),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 16),
        ("gfx950", "v_mfma_f32_16x16x16_bf16", 16),
        ("gfx950", "v_mfma_f32_16x16x32_bf16", 16),
        ("gfx950", "v_mfma_f32_32x32x16_f16", 32),
    ],
)
def test_matrix_instructions_of_a_card(card, instruction, clocks):
    cost = amd_loops.loop_cost([f"\t{instruction} v[0:3], v[4:5], v[6:7], v[0:3]"], card)
    assert cost.matrix_clocks == clocks


def test_a_matrix_instruction_without_a_rate_is_refused():
    line = "\tv_mfma_f32_16x16x8_xf32 v[0:3], v[4:5], v[6:7], v[0:3]"
    with pytest.raises(amd_loops.LoopError, match="v_mfma_f32_16x16x8_xf32: only"):
        amd_loops.loop_cost([line], "gfx942")


@pytest.mark.parametrize(
    ("line", "read", "written"),
    [
        ("ds_read_b64_tr_b16 v[0:1], v2", 8, 0),
        ("ds_read_u16_d16_hi v0, v2", 2, 0),
        ("ds_write2st64_b32 v0, v1, v2 offset1:4", 0, 8),
        ("ds_swizzle_b32 v0, v1 offset:swizzle(SWAP,16)", 4, 0),
        ("buffer_load_dwordx4 v0, s[8:11], 0 offen lds", 0, 16),
        ("buffer_load_dword v0, s[8:11], 0 offen lds", 0, 4),
        ("global_load_lds_dwordx4 v0, v1, s[8:9]", 0, 16),
        ("buffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen", 0, 0),
    ],
)
def test_bytes_of_local_memory(line, read, written):
    cost = amd_loops.loop_cost(["\t" + line], "gfx950")
    assert (cost.lds_read, cost.lds_written) == (64 * read, 64 * written)


@pytest.mark.parametrize(
    ("card", "registers", "lds", "num_warps", "waves"),
    [
        ("gfx942", 256, 16384, 4, 2),
        # one register too many leaves one wave
        ("gfx942", 257, 16384, 4, 1),
        ("gfx942", 160, 65536, 4, 1),
        ("gfx950", 160, 65536, 4, 2),
        # a program of 8 warps has two waves on each SIMD, so the third does not come
        ("gfx942", 160, 16384, 8, 2),
        ("gfx942", 100, 65537, 4, 0),
        ("gfx942", 16, 0, 4, 8),
    ],
)
def test_waves_of_a_simd(card, registers, lds, num_warps, waves):
    assert amd_loops.resident_waves(card, registers, lds, num_warps) == waves


def estimate(tile, waves, clocks=1000.0, features=128):
    cost = amd_loops.LoopCost(64 * 64 * 128 // 4, 512, 100, 2048, 1024, 25, 2)
    return amd_loops.shape_cost(cost, clocks, "gfx942", tile, 4, features, waves)


def test_estimate():
    one, two, many = (estimate((64, 64), waves) for waves in (1, 2, 4))
    assert (one.matrix, one.vector, one.lds, one.serial) == (512, 100, 4 * 24, 1000)
    # two waves hide each other's waits, and no more do
    assert (one.estimate, two.estimate, many.estimate) == (1000, 512, 512)
    assert estimate((64, 64), 2, clocks=1400).estimate == 700
    # per 64 x 64 scores: a tile of twice as many costs half
    assert estimate((128, 64), 1, features=64).estimate == 500
    assert estimate((64, 64), 1, features=64).repeats == 2


def test_a_loop_that_is_not_over_tiles_is_refused():
    with pytest.raises(amd_loops.LoopError, match=r"0\.50 of the multiplications"):
        estimate((128, 64), 1)


def test_what_llvm_mca_is_given():
    text = amd_loops.mca_input(
        ["\tv_permlane32_swap_b32_e32 v1, v2", *amd_loops.matrix_loop(ASSEMBLY)]
    )
    lines = text.splitlines()
    assert lines[:3] == [
        "\tv_mov_b32 v1, v2",
        "\tv_mov_b32 v2, v1",
        "\tbuffer_load_dwordx4 v[0:3], v4, s[8:11], 0 offen",
    ]
    # without the barrier and two branches
    assert len(lines) == 2 + 14 - 3
    assert not any("branch" in x or "barrier" in x for x in lines)


def test_without_llvm_mca(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(amd_loops.LoopError, match="llvm-mca-22, llvm-mca is on PATH; .*llvm-22"):
        amd_loops.mca_clocks(["\ts_nop 0"], "gfx942")


def test_llvm_mca_that_is_older_than_the_card(monkeypatch, tmp_path):
    # LLVM 14 says so, models another card and ends with 0
    old = tmp_path / "llvm-mca"
    old.write_text(
        """#!/bin/sh
[ "$1" = --version ] && echo "LLVM version 14.0.6 amdgcn" && exit
echo "Total Cycles: 100"
echo "'gfx942' is not a recognized processor for this target (ignoring processor)" >&2
"""
    )
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(amd_loops.LoopError, match="llvm-mca does not know gfx942; LLVM 22's does"):
        amd_loops.mca_clocks(["\ts_nop 0"], "gfx942")
    monkeypatch.setattr("sys.argv", ["rank_amd.py", "--card", "gfx942"])
    with pytest.raises(SystemExit, match="does not know gfx942"):
        rank_amd.main()


def test_rows_for_the_doctor():
    def found(shape, estimate, scratch=0, waves=2, mca=1):
        cost = amd_loops.ShapeCost(0, 0, 0, mca, estimate, waves, 1)
        taken = rank_amd.Resources(100, scratch // 4, scratch, 0, 0)
        return rank_amd.Ranked(rank_amd._shapes(shape)[0], taken, cost)

    rows = [
        found((128, 64, 4, 0, 1), 10, scratch=4),
        found((256, 64, 4, 0, 1), 11, waves=0),
        found((64, 64, 4, 2, 1), 12),
        # the same tile and warps
        found((64, 64, 4, 0, 1), 13),
        found((64, 64, 8, 0, 1), 14),
        # mca takes longer
        found((64, 16, 4, 1, 2), 14, mca=2),
    ]
    row = rank_amd.top_row(
        rank_amd.Case("gfx942", "dq", 64), rank_amd.order(list(reversed(rows))), 2
    )
    assert row == '    ("gfx942", "dq", 64): ((64, 64, 4, 1, 2), (64, 64, 8, 1, 0)),'
