"""The forward kernel for Hopper against float64: on an sm_90 GPU compiled, elsewhere in the simulator."""

import itertools
import random
from typing import Any
from unittest import mock

import pytest
import torch
from gluon_simulator import API, Fault, simulate
from numerics import (
    HAS_GPU,
    SOFTPICKS,
    Inputs,
    assert_no_worse_than_eager,
    by_formula,
    draw,
    each_normalizer,
    poisoned_memory,
    with_slow,
)

from fla.ops.attn.softpick import NORMALIZERS, naive_normalized_attn
from fla.ops.attn.softpick.hopper import forward
from fla.ops.attn.softpick.hopper.launch import FORWARD_SHAPES

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if IS_HOPPER else "cpu"
each_head_dim = pytest.mark.parametrize("D", FORWARD_SHAPES)
# names of `numerics.by_formula`, with what the launcher takes besides
PLAIN = {"cu_seqlens": None, "window_size": None, "sink_bias": None, "head_first": False}
# units of up to 192 queries start and end inside of them, and some are empty or shorter than a tile
BOUNDS = torch.tensor([0, 0, 1, 64, 130, 131, 330, 400], dtype=torch.int32)


def launch(
    inputs,
    *,
    normalizer,
    safe=True,
    shape=None,
    scale=None,
    programs=3,
    seed=0,
    faults=None,
    **options,
):
    """o and the natural lse; three programs, so that each has several units."""
    options = PLAIN | options
    scale = inputs.q.shape[-1] ** -0.5 if scale is None else scale
    module = forward
    if not IS_HOPPER:
        module = simulate(forward, seed, faults, num_processors=lambda device: programs)
    with poisoned_memory(), mock.patch.object(forward, "num_processors", return_value=programs):
        o, lse = module.hopper_normalized_attn_fwd(
            *inputs[:3],
            scale=scale,
            safe=safe,
            normalizer=normalizer,
            shape=shape,
            **options,
        )
    return o, lse * 0.6931471805599453


def check(inputs, *, normalizer, safe=True, shape=None, programs=3, seed=0, faults=None, **options):
    """Holds o to the reference by the rule of `numerics.py`, and lse to float32's precision."""
    how = {"shape": shape, "programs": programs, "seed": seed, "faults": faults}
    o, lse = launch(inputs, normalizer=normalizer, safe=safe, **how, **options)
    options = PLAIN | options
    eager = naive_normalized_attn(*inputs[:3], normalizer=normalizer, safe=safe, **options)
    gold = by_formula(inputs, normalizer, **options)
    assert isinstance(eager, torch.Tensor)
    assert_no_worse_than_eager("o", o, eager, gold.values["o"], gold.sizes["o"])
    check_lse(lse, gold.log_z, inputs, normalizer, options)
    assert o.is_contiguous()
    return o, lse


def check_lse(lse, log_z, inputs, normalizer, options):
    """Holds it to 8 roundings of float32: of scores by the norms of q and k, of each e^s - 1 by the size of e^s and of 1."""
    assert torch.equal(lse.isneginf(), log_z.isneginf())
    is_finite = ~log_z.isneginf()
    norms = inputs.q.double().norm(dim=-1) * inputs.k.double().norm(dim=-1).max()
    norms = norms * inputs.q.shape[-1] ** -0.5
    size = 1 + log_z.abs() + (norms if options["head_first"] else norms.mT)
    if normalizer in SOFTPICKS:
        num_keys = options["window_size"] or inputs.k.shape[2 if options["head_first"] else 1]
        sums = by_formula(inputs, "softmax", **options).log_z
        size = size + torch.exp(sums - log_z) + num_keys * torch.exp(-log_z)
    error = ((lse.double() - log_z).abs() / size)[is_finite]
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0.0, atol=2.0**-20)


def drawn(T, D, *, dtype=torch.bfloat16, **sizes) -> Inputs:
    return draw(T, D, dtype=dtype, device=DEVICE, **sizes)


@each_head_dim
@pytest.mark.parametrize("T", [1, 63, 64, 65, 129, 193, 330])
def test_lengths(D, T):
    check(drawn(T, D, HQ=2), normalizer="softpick", seed=T)


@each_normalizer
def test_normalizers(normalizer):
    check(drawn(130, 64, HQ=2, B=2), normalizer=normalizer)


@each_normalizer
def test_everything_at_once(normalizer):
    sink_bias = torch.tensor([0.5, -1.0, 2.0, -40.0], device=DEVICE)
    options = {"cu_seqlens": BOUNDS.to(DEVICE), "window_size": 100, "sink_bias": sink_bias}
    check(drawn(400, 64, HQ=4, H=2), normalizer=normalizer, **options)


@each_head_dim
@pytest.mark.parametrize("window_size", [None, 70])
def test_packed_sequences(D, window_size):
    options = {"cu_seqlens": BOUNDS.to(DEVICE), "window_size": window_size}
    check(drawn(400, D, HQ=2, H=1), normalizer="softpick", **options)


@pytest.mark.parametrize("window_size", [1, 33, 64, 129, 1000])
@pytest.mark.parametrize("S", [330, 501])
def test_windows_and_more_keys(window_size, S):
    check(drawn(330, 64, S=S), normalizer="softmax", window_size=window_size)


@pytest.mark.parametrize("T", [1, 70, 200])
def test_queries_are_the_last(T):
    check(drawn(T, 128, HQ=2, H=1, S=201), normalizer="softpick")


@pytest.mark.parametrize("D", [16, 48, 80, 96, 112])
def test_head_dimensions(D):
    check(drawn(70, D, HQ=2), normalizer="softpick")


@pytest.mark.parametrize("safe", [True, False])
@each_normalizer
def test_float16(normalizer, safe):
    check(drawn(130, 64, dtype=torch.float16), normalizer=normalizer, safe=safe)


def test_head_first():
    inputs = drawn(130, 64, B=2, HQ=2, H=1, head_first=True)
    check(inputs, normalizer="softpick", head_first=True)


def test_strided_inputs():
    inputs = drawn(100, 64, HQ=2)
    wide = torch.cat([*inputs[:3]], dim=2)
    q, k, v = wide.split(2, dim=2)
    views = Inputs(q, k, v, inputs.do)
    assert not views.q.is_contiguous()
    o, _ = launch(views, normalizer="softpick")
    torch.testing.assert_close(o, launch(inputs, normalizer="softpick")[0], rtol=0, atol=0)


def overflowing(T, D, **sizes) -> Inputs:
    """Some queries of the second half have scores of several hundreds."""
    inputs = drawn(T, D, **sizes)
    inputs.q[:, T // 2 :: 7] *= 60
    return inputs


@pytest.mark.parametrize(
    ("normalizer", "D"),
    [(x, D) for x in ("softpick", "softmax") for D in FORWARD_SHAPES]
    + [(x, 64) for x in NORMALIZERS if x not in ("softpick", "softmax")],
)
def test_rows_that_leave_the_range(normalizer, D):
    inputs = overflowing(260, D, HQ=2)
    o, lse = check(inputs, normalizer=normalizer)
    unsafe, unsafe_lse = launch(inputs, normalizer=normalizer, safe=False)
    is_valid = unsafe_lse.isfinite()
    assert 0.5 < is_valid.double().mean() < 1.0
    assert torch.equal(lse[is_valid], unsafe_lse[is_valid])
    assert torch.equal(o.transpose(1, 2)[is_valid], unsafe.transpose(1, 2)[is_valid])


@pytest.mark.parametrize("programs", [3, 1000])
def test_range_with_everything(programs):
    sink_bias = torch.tensor([0.5, 120.0], device=DEVICE)
    options = {"cu_seqlens": BOUNDS.to(DEVICE), "window_size": 100, "sink_bias": sink_bias}
    inputs = overflowing(400, 64, HQ=2, H=1)
    check(inputs, normalizer="softpick", programs=programs, **options)


@pytest.mark.skipif(IS_HOPPER, reason="counts in the simulator")
def test_only_units_that_failed_are_computed_again():
    inputs = overflowing(400, 64, HQ=2)
    tma_load, loads = API["tma_load"], []

    def load(descriptor, at, *arguments):
        if descriptor.view.data_ptr() == inputs.q.data_ptr():
            loads.append(at)
        tma_load(descriptor, at, *arguments)

    with mock.patch.dict(API, {"tma_load": load}):
        launch(inputs, normalizer="softpick")
    # of a head three units, of which the first has no large query; 64 queries for each of three warpgroups
    assert len(loads) == 2 * 3 * (3 + 2)


@each_head_dim
def test_number_of_programs_changes_no_bit(D):
    inputs = overflowing(450, D, HQ=2, B=2)
    one, *others = (launch(inputs, normalizer="softpick", programs=n) for n in (1, 5, 1000))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("seed", with_slow(range(60), range(6)))
def test_random_cases(seed):
    pick = random.Random(seed).choice
    D = pick(list(FORWARD_SHAPES))
    H, G, head_first, is_packed = (
        pick((1, 2)),
        pick((1, 3)),
        pick((False, True)),
        pick((False, True)),
    )
    T = 400 if is_packed else pick((1, 64, 100, 127, 192, 257))
    sizes: dict[str, Any] = {"HQ": H * G, "H": H, "head_first": head_first}
    if not is_packed:
        sizes |= {"B": pick((1, 2)), "S": T + pick((0, 0, 1, 64, 150))}
    sink_bias = torch.linspace(-3, 3, H * G, device=DEVICE) if pick((False, True)) else None
    options = {"cu_seqlens": BOUNDS.to(DEVICE) if is_packed else None, "sink_bias": sink_bias}
    options |= {"window_size": pick((None, None, 1, 50, 64, 200)), "head_first": head_first}
    dtype = pick((torch.float16, torch.bfloat16, torch.bfloat16))
    inputs = drawn(T, pick((D, D, D - 16)), dtype=dtype, **sizes)
    if is_large := pick((False, True)):
        # float16 could not hold larger queries
        rows = inputs.q if head_first else inputs.q.transpose(1, 2)
        rows[:, :, T // 2 :: 7] *= 60 if dtype == torch.bfloat16 else 8
    safe = is_large or pick((False, True))
    check(inputs, normalizer=pick(list(NORMALIZERS)), safe=safe, seed=seed, **options)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence(name):
    inputs, options = drawn(400, 64), dict[str, Any](cu_seqlens=BOUNDS.to(DEVICE))
    clean = launch(inputs, normalizer="softpick", **options)
    getattr(inputs, name)[0, 131] = float("nan")
    spoiled = launch(inputs, normalizer="softpick", **options)
    others = torch.ones(400, dtype=torch.bool, device=DEVICE)
    others[131:330] = False
    for x, y, dim in zip(clean, spoiled, (1, 2), strict=True):
        index = others.nonzero().flatten()
        assert torch.equal(x.index_select(dim, index), y.index_select(dim, index))
    assert spoiled[0][0, 131].isnan().all()


FAULTS = {
    "keys released before the product": (
        "            b_r = warpgroup_mma_wait(1, [b_r])\n            mbarrier.arrive(k_empty.index(n % KST), count=1)\n",
        "            mbarrier.arrive(k_empty.index(n % KST), count=1)\n            b_r = warpgroup_mma_wait(1, [b_r])\n",
    ),
    "values not waited for": ("            mbarrier.wait(v_full.index(last), ((n - 1) // VST) & 1)\n", ""),
    "queries released early": (
        "    q = q_s.index(C).reshape([64, BD]).load(gl.DotOperandLayout(0, S_L, 2))\n    mbarrier.arrive(q_empty.index(C), count=1)\n",
        "    mbarrier.arrive(q_empty.index(C), count=1)\n    q = q_s.index(C).reshape([64, BD]).load(gl.DotOperandLayout(0, S_L, 2))\n",
    ),
    "unit not waited for": ("        mbarrier.wait(q_full, w & 1)\n        i = load", "        i = load"),
    "unit overwritten": (
        "                for c in gl.static_range(NUM_WG):\n                    mbarrier.wait(q_empty.index(c), (w & 1) ^ 1)\n                announce_unit(unit_s, i, unit, IS_VARLEN)\n",
        "                announce_unit(unit_s, i, unit, IS_VARLEN)\n                for c in gl.static_range(NUM_WG):\n                    mbarrier.wait(q_empty.index(c), (w & 1) ^ 1)\n",
    ),
    "failed rows stored twice at once": ("        tma_store_done()\n", ""),
    "failed rows not reported": ("        store_scalar(memory[4].index(8 + C), gl.max(b_failed, 0))\n", ""),
    "failed rows forgotten": ("if not any_failed(unit_s, NUM_WG)", "if any_failed(unit_s, NUM_WG)"),
    "output stored without a fence": ("    fence_async_shared()\n                tma_store(", "    tma_store("),
    "output overwritten": ("            tma_store_wait(0)\n            o_s", "            o_s"),
    "mask of the diagonal": ("PHASE != 1, IS_SHIFTED, S_L", "False, IS_SHIFTED, S_L"),
    "first tile without a mask": ("W, NORMALIZER, HAS_WINDOW, True, IS_SHIFTED, S_L", "W, NORMALIZER, HAS_WINDOW, False, IS_SHIFTED, S_L"),
    "rows of another sequence": ("is_whole = i_t + C * 64 + 64 <= T", "is_whole = True"),
    "values of another sequence": ("is_tail = i_k + BN > S", "is_tail = False"),
    "tail left by a warpgroup without queries": ("    n_tails = clear_tail(memory, barriers, n, n_tails, S, end, C, BD, BN, NUM_WG, VST, IS_VARLEN)\n    return", "    return"),
    "queries kept by a warpgroup without queries": ("    mbarrier.arrive(barriers[1].index(C), count=1)\n    n_tails", "    n_tails"),
    "rescale": ("                b_z = b_z * b_f\n", ""),
}  # fmt: skip


@pytest.mark.skipif(IS_HOPPER, reason="faults may hang a GPU")
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    texts = FAULTS[name]
    faults = dict(zip(texts[::2], texts[1::2], strict=True))
    inputs = overflowing(400, 64, HQ=2)
    # keys must be what the loading warp waits for
    shape = FORWARD_SHAPES[64]._replace(KST=1, VST=4)
    for seed, window_size in itertools.product(range(20), (None, 100)):
        options = {"cu_seqlens": BOUNDS, "window_size": window_size, "seed": seed}
        try:
            check(inputs, normalizer="softpick", shape=shape, faults=faults, **options)
        except (Fault, AssertionError):
            return
    pytest.fail("not found")
