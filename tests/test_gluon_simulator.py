"""The simulator finds the faults that it says it finds: a small pipeline, and one thing broken at a time."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false

import re
import sys

import pytest
import torch
from gluon_simulator import API, Fault, simulate

from fla.ops.attn.softpick.hopper import gluon_api
from fla.ops.attn.softpick.hopper.gluon_api import (
    TensorDescriptor,
    allocate_barriers,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    named_sync,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def load(a_desc, a_s, full, empty, n_tiles):
    for i in range(n_tiles):
        mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), 64 * 64 * 2)
        tma_load(a_desc, [i * 64, 0], full.index(i % 2), a_s.index(i % 2))


@gluon.jit
def multiply(b_desc, a_s, b_s, full, empty, n_tiles, GROUP: gl.constexpr):
    """Adds the products of even tiles with themselves to the first block of b, those of odd tiles to the second."""
    acc = gl.zeros([64, 64], gl.float32)
    for i in range(n_tiles):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        if i % 2 == GROUP:
            a = a_s.index(i % 2)
            acc = warpgroup_mma(a, a.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty.index(i % 2), count=1)
    if GROUP == 1:
        named_sync(9, 256)
    b_s.index(GROUP).store(acc)
    fence_async_shared()
    if GROUP == 0:
        tma_store(b_desc, [0, 0], b_s.index(0))
        named_sync(9, 256)
    else:
        tma_add(b_desc, [64, 0], b_s.index(1))
    tma_store_wait(0)


@gluon.jit
def kernel(a_desc, b_desc, n_tiles):
    a_s = gl.allocate_shared_memory(gl.float16, [2, 64, 64], a_desc.layout)
    b_s = gl.allocate_shared_memory(gl.float32, [2, 64, 64], b_desc.layout)
    full = allocate_barriers(2, 1)
    empty = allocate_barriers(2, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (b_desc, a_s, b_s, full, empty, n_tiles, 0)),
            (multiply, (b_desc, a_s, b_s, full, empty, n_tiles, 1)),
            (load, (a_desc, a_s, full, empty, n_tiles)),
        ],
        [4, 1],
        [128, 24],
    )


def run(seed, faults=None):
    module = simulate(sys.modules[__name__], seed, faults)
    a = torch.randn(5 * 64, 64, generator=torch.Generator().manual_seed(0)).half()
    b = torch.ones(128, 64)
    a_desc = API["TensorDescriptor"](a, a.shape, a.stride(), [64, 64])
    b_desc = API["TensorDescriptor"](b, b.shape, b.stride(), [64, 64])
    module.kernel[(1,)](a_desc, b_desc, 5)
    tiles = a.double().reshape(5, 64, 64)
    products = tiles @ tiles.mT
    torch.testing.assert_close(b[:64].double(), products[::2].sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b[64:].double(), 1 + products[1::2].sum(0), rtol=1e-5, atol=1e-4)


def test_every_name_of_the_api_is_simulated():
    assert set(API) == set(gluon_api.__all__)
    assert TensorDescriptor is gluon_api.TensorDescriptor


@pytest.mark.parametrize("seed", range(5))
def test_a_right_kernel_passes(seed):
    run(seed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mbarrier.wait(full.index(i % 2), (i // 2) & 1)", "pass", "changed|not close"),
        ("mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)", "pass", "changed|arrivals|not close|deadlock"),
        ("            acc = warpgroup_mma_wait(0, [acc])\n", "", "may still run|Token|no attribute"),
        ("is_async=True)\n            acc = warp", "is_async=True)\n            mbarrier.arrive(empty.index(i % 2), count=1)\n            acc = warp", "changed|arrivals"),
        ("    fence_async_shared()\n    if GROUP", "    if GROUP", "without a fence"),
        ("    tma_store_wait(0)\n", "", "2 stores|1 stores"),
        ("if GROUP == 1:\n        named_sync(9, 256)", "if GROUP == 2:\n        pass", "deadlock: .*multiply 0 of program 0 waits for named barrier 9"),
        ("        named_sync(9, 256)\n    else", "    else", "deadlock: .*multiply 1 of program 0 waits for named barrier 9"),
        ("count=1)\n    if GROUP", "count=2)\n    if GROUP", "too many arrivals|changed|not close"),
        ("allocate_barriers(2, 2)", "allocate_barriers(2, 3)", "deadlock: .*load 2 of program 0 waits for empty"),
        ("range(n_tiles):\n        mbarrier.wait(full", "range(n_tiles - 1):\n        mbarrier.wait(full", "left at the end|not close"),
        ("64 * 64 * 2)", "64 * 64)", "deadlock: .*full"),
    ],
)  # fmt: skip
def test_a_fault_is_found(old, new, message):
    found = []
    for seed in range(8):
        try:
            run(seed, {old: new})
        except (Fault, AssertionError, AttributeError) as error:
            found.append(str(error))
    assert found
    assert any(re.search(message, x) for x in found), found[0]
