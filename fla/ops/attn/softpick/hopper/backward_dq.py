"""dq of a tile of queries in the backward kernel: the product of score gradients and keys, and how its writer gets it.

Halves of a tile of dq: 64 of its 128 queries at head dimension 64, 64 of its 128 columns at 128.
Legend: as in `backward_kernel.py`.
"""

from fla.ops.attn.softpick.hopper.backward_streams import word
from fla.ops.attn.softpick.hopper.gluon_api import (
    fence_async_shared,
    gl,
    gluon,
    load_scalar,
    mbarrier,
    opaque,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def dq_product(ds_s, k_s, C: gl.constexpr, D: gl.constexpr, HALVES: gl.constexpr):
    """[64, 64] of a tile of dq: 64 of its columns where it has 64 queries, else the C-th 64 queries; as a running product."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    b_dq = gl.zeros([64, 64], gl.float32, layout)
    zero = opaque(0)
    for c in gl.static_range(2):
        k = k_s.index(zero + c).reshape([64, D])
        if HALVES == 1:
            k = k.slice(C * 64, 64, 1)
            ds = ds_s.index(c)
        else:
            ds = ds_s.index(c * 2 + C)
        b_dq = warpgroup_mma(ds.permute((1, 0)), k, b_dq, use_acc=c == 1, is_async=True)
    return b_dq


@gluon.jit
def store_dq(b_dq, dq_s, dq_empty, n, C: gl.constexpr):
    """Stores half of a tile of dq for the tile's writer, in an order in which four numbers of a thread are neighbours."""
    buffer = (n & 1) * 2 + C
    mbarrier.wait(dq_empty.index(buffer), ((n // 2) & 1) ^ 1)
    b_dq = b_dq.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([1, 16, 256])
    dq_s.index(buffer).store(b_dq)


@gluon.jit
def hand_over_dq(dq_full, n, C: gl.constexpr):
    """Gives the writer what `store_dq` stored. The fence waits for the stores, so other work belongs in between."""
    fence_async_shared()
    mbarrier.arrive(dq_full.index((n & 1) * 2 + C), count=1)


@gluon.jit
def dq_group(
    ds_s, k_s, dq_s, unit_s, keys_full, dq_full, dq_empty, ds_full, ds_empty, D: gl.constexpr, HALVES: gl.constexpr
):  # fmt: skip
    """Computes dq of each tile, 64 queries after the other, once both consumers have stored their ds of them."""
    n = 0
    w = 0
    mbarrier.wait(keys_full.index(0), w & 1)
    num_tiles = load_scalar(word(unit_s, w, "num_tiles"))
    while num_tiles > 0:
        for _ in range(load_scalar(word(unit_s, w, "num_steps"))):
            for h in gl.static_range(HALVES):
                mbarrier.wait(ds_full.index(h), n & 1)
                b_dq = dq_product(ds_s, k_s, h, D, HALVES)
                b_dq = warpgroup_mma_wait(0, [b_dq])
                mbarrier.arrive(ds_empty.index(h), count=1)
                store_dq(b_dq, dq_s, dq_empty, n, h)
                hand_over_dq(dq_full, n, h)
            n += 1
        w += 1
        mbarrier.wait(keys_full.index(0), w & 1)
        num_tiles = load_scalar(word(unit_s, w, "num_tiles"))
