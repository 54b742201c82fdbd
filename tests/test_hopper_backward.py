"""The Hopper backward in the simulator, or on an sm_90 card if there is one: gradients, order of additions, faults."""

import math
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from gluon_machine import Fault
from gluon_simulator import API, simulate
from numerics import (
    HAS_GPU,
    assert_no_worse_than_eager,
    by_formula,
    draw,
    outputs_and_gradients,
    poisoned_memory,
    with_slow,
)

from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn
from fla.ops.attn.softpick.hopper import backward
from fla.ops.attn.softpick.normalizers import WITH_SMALL_DENOMINATORS

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper_or_simulator = pytest.mark.skipif(
    HAS_GPU and not IS_HOPPER, reason="the GPU is no sm_90, and turns the interpreter off"
)
needs_simulator = pytest.mark.skipif(HAS_GPU, reason="plants faults in the simulator")
pytestmark = needs_hopper_or_simulator


class Call(NamedTuple):
    """What the launcher takes, and what the reference says of it."""

    arguments: dict[str, Any]
    gold: dict[str, torch.Tensor]
    eager: dict[str, torch.Tensor]
    sizes: dict[str, torch.Tensor]


def prepare(
    T, D=64, *, normalizer="softpick", dtype=torch.bfloat16, has_dlse=False, head_first=False,
    K=None, V=None, B=1, HQ=1, H=None, S=None, change=None, **kwargs,
) -> Call:  # fmt: skip
    device = "cuda" if IS_HOPPER else "cpu"
    inputs = draw(
        T, K or D, V=V or D, B=B, HQ=HQ, H=H, S=S, head_first=head_first, dtype=dtype, device=device
    )
    if change is not None:
        change(inputs)
    generator = torch.Generator().manual_seed(1)
    dlse = torch.randn(B, HQ, T, generator=generator).to(device) if has_dlse else None
    for name in {"cu_seqlens", "sink_bias"} & kwargs.keys():
        kwargs[name] = torch.tensor(kwargs[name], device=device)
    options = {"normalizer": normalizer, "head_first": head_first, **kwargs}
    formulas = by_formula(inputs, **options)
    # float64 of the reference is exact for what it is given: the rounded output and lse are forward's
    gold = outputs_and_gradients(
        naive_normalized_attn,
        inputs.to(torch.float64),
        dlse=None if dlse is None else dlse.double(),
        **options | ({"sink_bias": kwargs["sink_bias"].double()} if "sink_bias" in kwargs else {}),
    )
    eager = outputs_and_gradients(naive_normalized_attn, inputs, dlse=dlse, **options)
    arguments = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        "sink_bias": kwargs.get("sink_bias"),
        "cu_seqlens": kwargs.get("cu_seqlens"),
        "o": gold["o"].to(dtype),
        "lse": (formulas.log_z / math.log(2)).float(),
        "do": inputs.do,
        # of the base-2 lse
        "dlse": None if dlse is None else dlse * math.log(2),
        "scale": kwargs.get("scale", inputs.q.shape[-1] ** -0.5),
        "window_size": kwargs.get("window_size"),
        "head_first": head_first,
        "normalizer": normalizer,
    }
    return Call(arguments, gold, eager, formulas.sizes)


def run(call: Call, programs=3, seed=0, faults=None) -> dict[str, torch.Tensor]:
    with poisoned_memory():
        if IS_HOPPER:
            with mock.patch.object(backward, "num_processors", return_value=programs):
                results = backward.hopper_normalized_attn_bwd(**call.arguments)
        else:
            module = simulate(backward, seed, faults, num_processors=lambda device: programs)
            results = module.hopper_normalized_attn_bwd(**call.arguments)
    return dict(zip(("dq", "dk", "dv", "row_stats"), results, strict=True))


def check(call: Call, got: dict[str, torch.Tensor]) -> None:
    q = call.arguments["q"]
    for name in "dq", "dk", "dv":
        assert_no_worse_than_eager(
            name, got[name], call.eager[name], call.gold[name], call.sizes[name], dtype=q.dtype
        )
    neg_lse2, delta = got["row_stats"].unbind(-1)
    lse = call.arguments["lse"]
    assert torch.equal(neg_lse2, torch.where(lse == -math.inf, -math.inf, -lse))
    o, do = (call.arguments[name].double() for name in ("o", "do"))
    if not call.arguments["head_first"]:
        o, do = o.transpose(1, 2), do.transpose(1, 2)
    expected = (o * do).sum(-1)
    slack = 0.0
    if call.arguments["normalizer"] in WITH_SMALL_DENOMINATORS:
        # from outputs that are not rounded
        exact = call.gold["o"] if call.arguments["head_first"] else call.gold["o"].transpose(1, 2)
        expected = torch.where(lse < 0, (exact * do).sum(-1), expected)
        # float32 holds e^s - 1 to about 2**-24, which the weights divide by the denominator
        magnify = torch.where(lse == -math.inf, 0.0, (-lse.double()).exp2())
        slack = 2**-22 * magnify * do.norm(dim=-1) * call.arguments["v"].double().norm(dim=-1).max()
    if call.arguments["dlse"] is not None:
        expected = expected - call.arguments["dlse"] / math.log(2)
    assert ((delta.double() - expected).abs() <= 1e-4 * (1 + expected.abs()) + slack).all()


FP16 = torch.float16
PACKED = [0, 1, 100, 100, 300, 429]
# T, and what else `prepare` takes; a default run takes the first ones
CASES = [
    {"T": 200, "HQ": 2, "H": 1, "has_dlse": True},
    {"T": 130, "D": 128, "HQ": 2, "head_first": True, "B": 2},
    {"T": 130, "D": 128, "dtype": FP16, "HQ": 2, "H": 1},
    {"T": 150, "S": 290, "window_size": 70, "D": 128},
    {"T": 429, "cu_seqlens": PACKED, "HQ": 4, "H": 2, "dtype": FP16},
    {"T": 429, "cu_seqlens": PACKED, "D": 128, "window_size": 50, "has_dlse": True},
    {"T": 140, "K": 48, "V": 64},
    {"T": 100, "K": 80, "V": 112, "scale": -0.2},
    {"T": 1}, {"T": 1, "D": 128, "S": 128}, {"T": 63}, {"T": 64, "D": 128}, {"T": 65, "D": 128}, {"T": 127},
    {"T": 128}, {"T": 129}, {"T": 128, "D": 128}, {"T": 257, "D": 128, "HQ": 3, "H": 1},
    {"T": 3, "S": 400, "window_size": 2}, {"T": 300, "window_size": 1}, {"T": 300, "window_size": 128, "D": 128},
    {"T": 300, "S": 431, "HQ": 4, "H": 4, "has_dlse": True}, {"T": 300, "scale": 3.0, "dtype": FP16},
    {"T": 500, "window_size": 129, "HQ": 2, "H": 1, "B": 2, "head_first": True}, {"T": 90, "K": 16, "V": 128},
]  # fmt: skip


def _name(case):
    return "-".join(f"{key}{value}" for key, value in case.items()).replace("torch.", "")


@pytest.mark.parametrize("case", with_slow(CASES, CASES[:8]), ids=_name)
def test_gradients(case):
    call = prepare(**case)
    check(call, run(call))


QUICK = ("softpick", "abs_softpick", "softmax", "rectified")
EVERYTHING = {"T": 300, "D": 128, "HQ": 2, "H": 1, "cu_seqlens": [0, 140, 300], "window_size": 100}


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16])
@pytest.mark.parametrize("case", with_slow([{"T": 150}, EVERYTHING], [{"T": 150}]), ids=_name)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_of_each_normalizer(normalizer, case, dtype):
    call = prepare(**case, normalizer=normalizer, dtype=dtype, has_dlse=True)
    check(call, run(call))


@pytest.mark.parametrize("normalizer", ["softpick", "rectified", "softmax"])
def test_small_sink(normalizer):
    # a row without a positive score has a denominator of e^-150 in rectified
    call = prepare(70, HQ=2, normalizer=normalizer, sink_bias=[-150.0, 0.5])
    check(call, run(call))


def test_tiny_scores_in_float16():
    # scores of 1e-6, so 1 / Z reaches 1e6
    def shrink(inputs):
        inputs.k.mul_(2.0**-10)
        inputs.q.mul_(2.0**-10)

    call = prepare(140, dtype=FP16, HQ=2, H=1, change=shrink)
    got = run(call)
    # not dv, whose weights are differences of exponentials of about 1e6; delta is summed from such weights, whose
    # relative error is 2e-8 / s
    for name in "dq", "dk":
        error = (got[name].double() - call.gold[name]).norm() / call.gold[name].norm()
        assert error < 0.05, (name, error)
    if not IS_HOPPER:
        # ds overflows without the rescale
        plain = run(
            call, faults={"q.dtype == torch.float16 and normalizer": "False and normalizer"}
        )
        assert not plain["dq"].isfinite().all()
        assert not plain["dk"].isfinite().all()


ORDERS = [
    {"T": 400, "HQ": 2, "H": 1},
    {"T": 300, "D": 128, "HQ": 2, "H": 2, "window_size": 140},
    {"T": 429, "cu_seqlens": PACKED, "HQ": 2, "H": 1},
]


@needs_simulator
def test_keys_from_shared_memory():
    call = prepare(200, HQ=2, H=1)
    with mock.patch.dict(API, {"KEYS_IN_REGISTERS": not API["KEYS_IN_REGISTERS"]}):
        check(call, run(call))


@needs_simulator
@pytest.mark.parametrize("case", with_slow(ORDERS, ORDERS[:2]), ids=_name)
def test_number_of_programs_and_their_order_change_no_bit(case):
    call = prepare(**case)
    first = run(call, programs=1)
    for programs, seed in (2, 1), (5, 2), (1000, 3):
        for name, x in run(call, programs, seed).items():
            assert torch.equal(x, first[name]), (name, programs)


@pytest.mark.gpu
def test_runs_agree_bitwise():
    call = prepare(2000, 128, HQ=8, H=2, B=2)
    first = run(call)
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in run(call).items())


@pytest.mark.parametrize("D", [64, 128])
def test_sequences_do_not_see_each_others_nan(D):
    cu_seqlens = [0, 70, 200, 330]
    clean = prepare(330, D, cu_seqlens=cu_seqlens, HQ=2, H=1)
    expected = run(clean)

    spoiled = prepare(330, D, cu_seqlens=cu_seqlens, HQ=2, H=1)
    for name in "q", "k", "v", "do", "o":
        spoiled.arguments[name][:, 70:200] = math.nan
    spoiled.arguments["lse"][..., 70:200] = math.nan
    got = run(spoiled)
    for name in "dq", "dk", "dv":
        for rows in slice(0, 70), slice(200, 330):
            assert torch.equal(got[name][:, rows], expected[name][:, rows]), name
        assert got[name][:, 70:200].isnan().any(-1).all(), name


def test_nan_of_a_query_reaches_its_gradient():
    call = prepare(150, HQ=2, H=1)
    call.arguments["q"][0, 100, 1] = math.nan
    call.arguments["lse"][0, 1, 100] = math.nan
    call.arguments["o"][0, 100, 1] = math.nan
    got = run(call)
    assert got["dq"][0, 100, 1].isnan().all()
    others = torch.ones(150, 2, dtype=torch.bool)
    others[100, 1] = False
    assert got["dq"][0][others.to(got["dq"].device)].isfinite().all()
    for name in "dk", "dv":
        assert got[name][0, :101].isnan().any(-1).all(), name


# fmt: off
FAULTS = [
    # a buffer is released early
    ("    b_dk, b_dv = warpgroup_mma_wait(1 if HAS_NEXT else 0, [b_dk, b_dv])\n    mbarrier.arrive(tile_empty.index(stage), count=1)\n", "    mbarrier.arrive(tile_empty.index(stage), count=1)\n    b_dk, b_dv = warpgroup_mma_wait(1 if HAS_NEXT else 0, [b_dk, b_dv])\n"),
    ("        tma_store_wait(0)\n        mbarrier.arrive(keys_empty", "        mbarrier.arrive(keys_empty"),
    ("        b_dq = warpgroup_mma_wait(0, [b_dq])\n        mbarrier.arrive(ds_empty.index(C), count=1)\n        store", "        mbarrier.arrive(ds_empty.index(C), count=1)\n        b_dq = warpgroup_mma_wait(0, [b_dq])\n        store"),
    ("                b_dq = warpgroup_mma_wait(0, [b_dq])\n                mbarrier.arrive(ds_empty.index(h), count=1)\n", "                mbarrier.arrive(ds_empty.index(h), count=1)\n                b_dq = warpgroup_mma_wait(0, [b_dq])\n"),
    # a wait or a fence is missing
    ("    mbarrier.wait(dq_empty.index(buffer), ((n // 2) & 1) ^ 1)\n", ""),
    ("            mbarrier.wait(ds_empty.index(1 - C), (n & 1) ^ 1)\n", "            pass\n"),
    ("            mbarrier.wait(ds_empty.index(h), (n & 1) ^ 1)\n", "            pass\n"),
    ("                mbarrier.wait(ds_full.index(h), n & 1)\n", ""),
    ("            mbarrier.wait(ds_empty.index(HALVES - 1), n & 1)\n", "            pass\n"),
    ("    mbarrier.wait(tile_full.index(n & 1), (n // 2) & 1)\n", ""),
    ("            mbarrier.wait(tile_empty.index(stage), ((n // 2) & 1) ^ 1)\n", ""),
    ("                tma_store_wait(0)\n                for c", "                for c"),
    ("    fence_async_shared()\n    mbarrier.arrive(dq_full", "    mbarrier.arrive(dq_full"),
    ("        fence_async_shared()\n        if D == 128:\n            named_sync", "        if D == 128:\n            fence_async_shared()\n            named_sync"),
    ("        fence_async_shared()\n        if D == 128:\n            named_sync", "        if D == 128:\n            named_sync"),
    ("            named_sync(DS_BARRIER, 256)\n        else:\n            mbarrier.arrive(ds_full", "            pass\n        else:\n            mbarrier.arrive(ds_full"),
    ("            named_sync(DS_BARRIER, 256)\n        else:\n            mbarrier.wait(ds_empty", "            pass\n        else:\n            mbarrier.wait(ds_empty"),
    # dq of one tile only
    ("    buffer = (n & 1) * 2 + C\n", "    buffer = C\n"),
    # something is announced before it is there, or twice
    ("            if has_dq:\n", "            if n > 0:\n"),
    ("n, distance, limit, num_steps > 1, base2_scale", "n, distance, limit, True, base2_scale"),
    # rows of packed sequences are stored without a descriptor, and the next keys loaded over them
    ("    # for the store from it, or the next load into it\n    fence_async_shared()\n", ""),
    ("    fence_async_shared()\n    mbarrier.arrive(dq_full.index((n & 1) * 2 + C), count=1)\n", "    mbarrier.arrive(dq_full.index((n & 1) * 2 + C), count=1)\n    fence_async_shared()\n"),
    ("        store_scalar(word(unit_s, w, \"position\"), i_t)\n        # before a thread of the warp arrives for all\n        group_barrier()\n        mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)\n", "        mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)\n        store_scalar(word(unit_s, w, \"position\"), i_t)\n        group_barrier()\n"),
    ("    store_scalar(word(unit_s, w, \"num_tiles\"), 0)\n    group_barrier()\n    mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)\n", "    mbarrier.arrive(unit_full.index(w % NUM_UNITS), count=1)\n    store_scalar(word(unit_s, w, \"num_tiles\"), 0)\n    group_barrier()\n"),
    # the order of additions
    ("                wait_turn(turns + tile, turn)\n", ""),
    ("        turn = i_t // BT\n", "        turn = 0\n"),
    ("        turn = i_t // BT\n", "        turn = i_t // BT + 1\n"),
    ("                pass_turn(turns + tile)\n", "                tma_store_wait(0)\n"),
    # the queue of units, and its end
    ("    # no unit is left\n    mbarrier.wait(keys_empty.index(0), (w & 1) ^ 1)\n", ""),
    ("    store_scalar(word(unit_s, w, \"num_tiles\"), 0)\n", ""),
    ("        w += 1\n        i = take_number(next_unit)\n", "        w += 1\n        i = take_number(next_unit) + 1\n"),
    ("        mbarrier.wait(unit_full.index(w % NUM_UNITS), (w // NUM_UNITS) & 1)\n        num_tiles", "        num_tiles"),
    # the mask, and what is past the ends
    ("d >= 63", "d >= -64"),
    ("d > -64", "d > 0"),
    ("(d < limit)", "(d + 64 < limit)"),
    ("limit = gl.minimum(limit, W + 63)", "limit = gl.minimum(limit, W - 64)"),
    ("m_s = visible(o_q", "m_s = visible(1 + o_q"),
    # a tile, a head or a key too few
    ("tile -= G * NQ + 1", "tile -= G * NQ"),
    ("distance -= BQ", "distance -= BQ // 2"),
    # the two writers
    ("w % NUM_UNITS * UNIT_WORDS", "w % 2 * UNIT_WORDS"),
    ("    store_scalar(progress, -1)\n", "    if (n & 1) == PARITY:\n        store_scalar(progress, n - 1)\n    else:\n        store_scalar(progress, -1)\n"),
]
# fmt: on


@needs_simulator
@pytest.mark.parametrize(
    "fault", with_slow(FAULTS, FAULTS[::4]), ids=lambda fault: fault[0].strip()[:50]
)
def test_a_fault_is_found(fault):
    old, new = fault
    cases = (
        {"T": 330, "HQ": 2, "H": 1, "normalizer": "softmax"},
        {"T": 200, "D": 128, "HQ": 2},
        # many units of one tile
        {"T": 60, "HQ": 12},
        {"T": 60, "D": 128, "HQ": 12},
        {"T": 200, "cu_seqlens": [0, 70, 200], "HQ": 2, "H": 1},
        {"T": 300, "window_size": 140, "HQ": 2, "H": 1},
    )
    for case in cases:
        call = prepare(**case, dtype=FP16)
        expected = run(call)
        for seed in range(8):
            try:
                got = run(call, seed=seed, faults={old: new})
            except Fault:
                return
            if not all(torch.equal(x, expected[name]) for name, x in got.items()):
                return
    pytest.fail("nothing was found")
