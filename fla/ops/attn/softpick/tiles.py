"""What forward and backward share: tiles of programs, bounds of the keys and queries they stream, loads and stores.

Legend
    i_t BT             first row and size of the tile of a program: queries in forward and dq, keys in dkv
    i_s BS             first row and size of a tile that the program streams: keys, or queries
    T, S               queries and keys of one sequence; its queries are the last T of S positions
    W                  window: query i sees the keys j with i - W < j <= i
    NT                 tiles of a head: of one sequence, or with IS_VARLEN of all that are packed
    tiles              [NT, 3] int32 with IS_VARLEN: first token of the sequence, its length, i_t in the sequence
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakIdKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from fla.ops.attn.softpick.checks import check_bounds


@triton.jit
def load_rows(
    p,
    i_t,
    stride,
    T,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """[BT, BD] rows i_t, i_t + 1, ... of p. Columns from D on read as 0; rows from T on do with IS_MASKED."""
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    # the start is 64-bit, offsets within a tile fit 32 bits (`parallel.py` refuses wider strides)
    p_x = p + tl.cast(i_t, tl.int64) * stride + o_t[:, None] * stride + o_d[None, :]
    if IS_MASKED:
        if D == BD:
            return tl.load(p_x, mask=(i_t + o_t < T)[:, None], other=0.0)
        else:
            return tl.load(p_x, mask=(i_t + o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
    else:
        if D == BD:
            return tl.load(p_x)
        else:
            return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def stream_rows(
    p,
    desc,
    i_b,
    i_h,
    bos,
    i_t,
    stride,
    T,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """`load_rows`; tiles without a mask come through the descriptor of [B, T, H, D], unless desc is None."""
    # a descriptor is bounded by the tensor, not by a packed sequence, so it serves only tiles inside one
    if IS_MASKED or desc is None:
        return load_rows(p, i_t, stride, T, D, BT, BD, IS_MASKED)
    else:
        at = tl.cast(i_b, tl.int32), tl.cast(bos + i_t, tl.int32), tl.cast(i_h, tl.int32), 0
        return tl.reshape(desc.load(at), [BT, BD])


@triton.jit
def store_rows(p, b_x, i_t, stride, m_t, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Stores b_x [BT, BD] as rows i_t, i_t + 1, ... of p where m_t [BT] is True; columns from D on are dropped."""
    o_t = tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    p_x = p + tl.cast(i_t, tl.int64) * stride + o_t[:, None] * stride + o_d[None, :]
    tl.store(p_x, b_x.to(p.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])


@triton.jit
def round_for_dot(b_x, dtype: tl.constexpr, ROUNDS_BY_BITS: tl.constexpr):
    """b_x, fp32, rounded to dtype; with ROUNDS_BY_BITS to bfloat16 by integer arithmetic.

    Some NaN become inf or 0, so the caller must let NaN through by other means: forward and decoding by the
    denominator, backward by delta.
    """
    if ROUNDS_BY_BITS:
        # NOTE(numerics): to nearest, ties away from zero, so the error is at most half a unit, as with ties to even.
        # inf remains inf, and beyond the largest finite value the carry gives inf. NaN below 0x7f808000 becomes inf,
        # NaN from 0x7fff8000 on a zero: the carry leaves the exponent.
        b_bits = b_x.to(tl.uint32, bitcast=True) + 0x8000
        return (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


@triton.jit
def program_tile(
    tiles, T, S, NT, BT: tl.constexpr, IS_VARLEN: tl.constexpr, IS_LAST_FIRST: tl.constexpr
):
    """Tile of the program: (batch * heads + head, i_t, offset of the sequence in the packed row, T, S).

    IS_LAST_FIRST starts the last tiles first: the keys that a causal tile of queries sees grow with i_t.
    """
    i_tile = tl.program_id(0) % NT
    i_bh = (tl.program_id(0) // NT).to(tl.int64)
    if IS_VARLEN:
        bos = tl.load(tiles + i_tile * 3).to(tl.int64)
        T = tl.load(tiles + i_tile * 3 + 1)
        i_t = tl.load(tiles + i_tile * 3 + 2)
        return i_bh, i_t, bos, T, T
    else:
        if IS_LAST_FIRST:
            i_tile = NT - 1 - i_tile
        return i_bh, i_tile * BT, tl.full([], 0, tl.int64), T, S


class TileBounds(NamedTuple):
    """Bounds of the keys or queries that a program streams, [first, end).

    Tiles in [first_full, end_full) need no mask, the other tiles do. All bounds but `end` are multiples of BS.
    """

    first: tl.tensor | int
    first_full: tl.tensor | int
    end_full: tl.tensor | int
    end: tl.tensor | int


@triton.jit
def key_tile_bounds(i_t, T, S, W, BT: tl.constexpr, BS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """`TileBounds` of the keys that the queries [i_t, i_t + BT) see."""
    i_q = i_t + S - T
    first = 0
    first_full = 0
    if HAS_WINDOW:
        first = tl.maximum(i_q - W + 1, 0) // BS * BS
        first_full = tl.cdiv(tl.maximum(i_q + BT - W, 0), BS) * BS
    end_full = tl.maximum((i_q + 1) // BS * BS, first_full)
    return TileBounds(first, first_full, end_full, end=tl.minimum(i_q + BT, S))


@triton.jit
def query_tile_bounds(i_t, T, S, W, BT: tl.constexpr, BS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """`TileBounds` of the queries that see the keys [i_t, i_t + BT)."""
    i_k = i_t - (S - T)
    first = tl.maximum(i_k, 0) // BS * BS
    first_full = tl.cdiv(tl.maximum(i_k + BT - 1, 0), BS) * BS
    end = T
    end_full = T
    if HAS_WINDOW:
        end = tl.minimum(i_k + BT - 1 + W, T)
        end_full = tl.minimum(tl.maximum(i_k + W, 0), T)
    end_full = tl.maximum(end_full // BS * BS, first_full)
    return TileBounds(first, first_full, end_full, end)


@triton.jit
def visible(o_q, o_k, W, HAS_WINDOW: tl.constexpr):
    """True where the query at position o_q sees the key at o_k; the two broadcast."""
    m_s = o_k <= o_q
    if HAS_WINDOW:
        m_s = m_s & (o_k > o_q - W)
    return m_s


def feature_tile(D: int) -> int:
    """Power of two that holds a head dimension; ``tl.dot`` needs 16."""
    return max(16, 1 << (D - 1).bit_length())


def empty_rows(q: torch.Tensor, T: int, H: int, D: int, head_first: bool) -> torch.Tensor:
    """``[B, H, T, D]`` or ``[B, T, H, D]`` with the dtype and device of ``q``."""
    return q.new_empty((q.shape[0], H, T, D) if head_first else (q.shape[0], T, H, D))


def strides_bth(x: torch.Tensor, head_first: bool) -> tuple[int, int, int]:
    """Strides of batch, time and head, in elements.

    A kernel takes the tuple as one argument, which the host passes faster than three, or than a NamedTuple.
    """
    b, t, h, _ = x.stride()
    return (b, h, t) if head_first else (b, t, h)


def descriptor_strides(x: torch.Tensor, head_first: bool) -> list[int]:
    """Strides of batch, time and head, in elements; 16 for a dimension of size 1, whose stride is never used."""
    B, T, H, _ = x.shape
    b, t, h, _ = x.stride()
    if head_first:
        T, H, t, h = H, T, h, t
    return [b if B > 1 else 16, t if T > 1 else 16, h if H > 1 else 16]


def row_descriptor(x: torch.Tensor, head_first: bool, BT: int, BD: int) -> TensorDescriptor | None:
    """Descriptor of ``x`` as ``[B, T, H, D]`` for tiles ``[BT, BD]``.

    None if ``x`` is empty, or if a row does not start at a multiple of 16 bytes, which descriptors require.
    """
    strides = descriptor_strides(x, head_first)
    if x.numel() == 0 or x.data_ptr() % 16:
        return None
    if any(s <= 0 or s * x.element_size() % 16 for s in strides):
        return None
    shape = [x.shape[i] for i in ((0, 2, 1, 3) if head_first else (0, 1, 2, 3))]
    return TensorDescriptor(x, shape, [*strides, 1], [1, BT, 1, BD])


def streamed_descriptors(
    options: dict[str, int | str], head_first: bool, *tensors: torch.Tensor
) -> list[TensorDescriptor | None]:
    """Descriptors of the tensors that a kernel streams if its launch options ask for them, else None for each.

    Removes HAS_DESCRIPTORS from ``options``, since the kernel does not take it.
    """
    if not options.pop("HAS_DESCRIPTORS"):
        return [None] * len(tensors)
    return [
        row_descriptor(x, head_first, int(options["BS"]), feature_tile(x.shape[-1]))
        for x in tensors
    ]


class PackedSequences:
    """Lists of the tiles of packed sequences, one for each tile size, built on demand and kept."""

    def __init__(self, cu_seqlens: torch.Tensor, T: int):
        # the only synchronisation with the GPU
        bounds = cu_seqlens.tolist()
        check_bounds(bounds, T)
        self._device = cu_seqlens.device
        self._starts = torch.tensor(bounds[:-1])
        self._lengths = torch.tensor(bounds).diff()
        self._tiles: dict[tuple[int, bool], torch.Tensor] = {}
        self._numbered: dict[tuple[int, int], torch.Tensor] = {}

    def tiles(self, BT: int, is_last_first: bool) -> torch.Tensor:
        """``[NT, 3]`` int32, see the legend, most work first: with ``is_last_first`` late tiles have most, else early ones."""
        key = BT, is_last_first
        if key not in self._tiles:
            tiles = self._list_tiles(BT, is_last_first)
            self._tiles[key] = tiles.to(self._device, torch.int32)
        return self._tiles[key]

    def _list_tiles(self, BT: int, is_last_first: bool) -> torch.Tensor:
        """`tiles`, int64 on the CPU."""
        counts = (self._lengths + BT - 1) // BT
        sequences = torch.arange(len(counts)).repeat_interleave(counts)
        before = (counts.cumsum(0) - counts)[sequences]
        i_t = BT * (torch.arange(len(sequences)) - before)
        lengths = self._lengths[sequences]
        work = i_t if is_last_first else lengths - i_t
        order = work.argsort(descending=True, stable=True)
        return torch.stack([self._starts[sequences], lengths, i_t], 1)[order]

    def numbered_tiles(self, BT: int, BQ: int) -> torch.Tensor:
        """``[NT, 4]`` int32: `tiles`, early ones first, and the number of tiles of BQ rows of all sequences before."""
        key = BT, BQ
        if key not in self._numbered:
            counts = (self._lengths + BQ - 1) // BQ
            # an empty sequence starts where the next one does and has no tile
            has_tiles = counts > 0
            starts, before = self._starts[has_tiles], (counts.cumsum(0) - counts)[has_tiles]
            tiles = self._list_tiles(BT, is_last_first=False)
            number = before[torch.searchsorted(starts, tiles[:, 0].contiguous())]
            numbered = torch.cat([tiles, number[:, None]], 1)
            self._numbered[key] = numbered.to(self._device, torch.int32)
        return self._numbered[key]


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_sequences(cu_seqlens: torch.Tensor, T: int) -> PackedSequences:
    """Reads cu_seqlens back from the GPU when the tensor is new or has changed.

    All layers of a model, forward and backward, share one read.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T.
    """
    if cu_seqlens.is_inference():
        # an inference tensor has no version counter, so a change would go unnoticed
        return PackedSequences(cu_seqlens, T)
    seen = cu_seqlens._version, T
    entry = _packed.get(cu_seqlens)
    if entry is None or entry[0] != seen:
        entry = _packed[cu_seqlens] = seen, PackedSequences(cu_seqlens, T)
    return entry[1]


def tiles_of(
    cu_seqlens: torch.Tensor | None, T: int, BT: int, is_last_first: bool
) -> tuple[int, torch.Tensor | None]:
    """Number of tiles of BT rows a head has, and their list for packed sequences (else None)."""
    if cu_seqlens is None:
        return -(-T // BT), None
    tiles = packed_sequences(cu_seqlens, T).tiles(BT, is_last_first)
    return len(tiles), tiles
