"""Matrix instructions: D = A B + C for one wave, the matrices spread over its lanes.

M is 16 or 32. Lane l holds a part of row l % M of A and of column l % M of B: the elements whose index along K belongs
to the lane's group, l // M. Of C and D it holds elements of column l % M, in blocks of four rows.
"""

import re

import numpy as np

from amd.arithmetic import TINY
from amd.decode import ACCUMULATORS, FIRST_VECTOR, Instruction
from amd.registers import LANES, Step, Waves, constant


def _numbers(w: Waves, register: int, count: int, kind: str, is_flushed: bool) -> np.ndarray:
    """[waves, 64, K] the numbers of each lane in `count` registers, as float64."""
    x = np.ascontiguousarray(w.v[register : register + count].transpose(1, 2, 0))
    if kind == "BF16":
        x = (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif kind == "F16":
        x = x.view(np.float16)
    else:
        x = x.view(np.float32)
    if kind == "XF32":
        # 10 bits of the fraction, to nearest even; unverified: the manual does not say how the card rounds
        bits = x.view(np.uint32)
        even = bits >> np.uint32(13) & np.uint32(1)
        x = (bits + np.uint32(0xFFF) + even & np.uint32(0xFFFFE000)).view(np.float32)
    if is_flushed:
        tiny = 2.0**-14 if kind == "F16" else TINY
        x = np.where(np.abs(x) < tiny, x.dtype.type(0), x)
    return x.astype(np.float64)


def build(op: Instruction) -> Step | None:
    """V_MFMA_F32_MxMxK_type, None for any other name."""
    match = re.fullmatch(r"V_MFMA_F32_(16|32)X(?:16|32)X(\d+)_(F16|BF16|F32|XF32)", op.name)
    if match is None:
        return None
    M, K, kind = int(match[1]), int(match[2]), match[3]
    groups = LANES // M
    # registers that hold K / groups numbers
    count = K // groups // (2 if kind in ("F16", "BF16") else 1)
    assert op.field("cbsz") == op.field("abid") == op.field("blgp") == 0, "a broadcast"
    acc, is_accumulator = op.field("acc"), op.field("acc_cd")
    a = op.operand("src0") - FIRST_VECTOR + ACCUMULATORS * (acc & 1)
    b = op.operand("src1") - FIRST_VECTOR + ACCUMULATORS * (acc >> 1)
    c = op.operand("src2")
    c_value = constant(c, None, "f")
    if c_value is None:
        c += ACCUMULATORS * is_accumulator - FIRST_VECTOR
    d = op.operand("vdst") - FIRST_VECTOR + ACCUMULATORS * is_accumulator
    size = M * M // LANES
    # https://rocm.docs.amd.com/projects/MIOpen/en/latest/MI200AlternateImplementation.html: MFMA_F16, MFMA_BF16 and
    # MFMA_BF16_1K of MI200 flush subnormal inputs and outputs to zero
    is_flushed = op.card == "gfx90a" and kind in ("F16", "BF16")

    def rows(x):
        """[waves, blocks, group, 4, M] of registers to [waves, M, M]."""
        return x.reshape(size // 4, 4, -1, groups, M).transpose(2, 0, 3, 1, 4).reshape(-1, M, M)

    def step(w: Waves) -> None:
        a_MK = _numbers(w, a, count, kind, is_flushed).reshape(-1, groups, M, K // groups)
        b_KM = _numbers(w, b, count, kind, is_flushed).reshape(-1, groups, M, K // groups)
        a_MK = a_MK.transpose(0, 2, 1, 3).reshape(-1, M, K)
        b_KM = b_KM.transpose(0, 1, 3, 2).reshape(-1, K, M)
        total = a_MK @ b_KM + (rows(w.f[c : c + size]) if c_value is None else c_value)
        total = total.astype(np.float32)
        if is_flushed:
            total = np.where(np.abs(total) < TINY, np.float32(0), total)
        total = total.reshape(-1, size // 4, groups, 4, M).transpose(1, 3, 0, 2, 4)
        # a matrix instruction does not look at EXEC
        w.f[d : d + size] = total.reshape(size, -1, LANES)

    return step
