"""Key ranges of the rows of a batch, for operators that mask by position only: padding and static caches.

transformers creates a mask once per forward pass and hands it to every layer. The operators of this repository need
no mask if all rows are whole. If some are padded, or a cache is not full, `KeyRanges` replaces the mask: the
columns of the key tensor that hold a row's sequence.
"""

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fla.ops.attn.softpick import (
    naive_normalized_attn,
    naive_normalized_attn_decode,
    normalized_attn_decode,
)
from fla.ops.attn.softpick.decoding import MAX_ROWS


class KeyRanges(NamedTuple):
    """Row ``b`` has the keys in columns ``[starts[b], ends[b])``; queries are the last columns before ``stop``."""

    starts: torch.Tensor
    """``[B]`` int32."""
    ends: torch.Tensor
    """``[B]`` int32; below ``stop`` where a row is padded on the right."""
    stop: int | torch.Tensor
    """One past the column of the last query: a tensor while a static cache is decoded."""
    bounds: list[tuple[int, int]] | None
    """``starts`` and ``ends`` on the host; None where reading them would synchronise with the GPU at each token."""

    # generate() makes the mask of a static cache, reads these two attributes, and passes it to the model
    ndim = 0

    def contiguous(self) -> "KeyRanges":
        """Itself: transformers asks this of a mask."""
        return self

    def queries(self, T: int) -> list[tuple[int, int]]:
        """For each row, first and one past the last of its ``T`` queries that are not padding."""
        begin: int = self.stop - T  # pyright: ignore[reportAssignmentType]  # if the bounds are known, stop is an int
        return [(max(first - begin, 0), max(end - begin, 0)) for first, end in self.bounds]  # pyright: ignore[reportOptionalIterable]  # callers check that the bounds are known


class MaskSentinel(enum.Enum):
    """What transformers hands to the layers instead of a mask, where the operator has to find out more."""

    MAYBE_PACKED = "packed"
    """Positions may restart inside a row: they do, or a graph is traced and this cannot be checked here.

    `flame.models.packing` finds the documents."""


MAYBE_PACKED = MaskSentinel.MAYBE_PACKED


class Reads:
    """Share of the cached values that decoding has read, or would have to read in the reference."""

    def __init__(self) -> None:
        self.steps = 0
        self._sum = torch.zeros(())

    def add(self, share: torch.Tensor) -> None:
        """Share of each row and key head ``[B, H]`` in one layer and step."""
        self.steps += 1
        # kept on the device: reading it at every step would synchronise
        self._sum = self._sum.to(share.device) + share.mean()

    def share(self) -> float:
        """Mean over all layers and steps."""
        return self._sum.item() / self.steps


_reads: Reads | None = None


@contextlib.contextmanager
def count_reads() -> Iterator[Reads]:
    """Context in which the reads of cached values are counted."""
    global _reads
    _reads = Reads()
    try:
        yield _reads
    finally:
        _reads = None


def causal_key_ranges(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: "torch.Tensor | KeyRanges | None" = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    local_size: int | None = None,
    dtype: torch.dtype | None = None,
    config: Any = None,
    device: torch.device | None = None,
) -> KeyRanges | MaskSentinel | None:
    """Replaces transformers' causal mask; None if the position alone decides, outside of generation.

    The arguments are those that transformers passes. ``local_size``, a window, also reaches the operator; ``dtype``
    and ``allow_is_bidirectional_skip`` are not needed.

    Raises:
        NotImplementedError: A mask that is neither causal nor packed nor padding, or a row with zeros between ones.
    """
    if isinstance(attention_mask, KeyRanges):
        return attention_mask
    is_static = isinstance(q_offset, torch.Tensor)
    # for a single query transformers forbids skipping the mask when it compiles
    if not allow_is_causal_skip and q_length > 1:
        # positions that restart come as an "and" around the whole mask; blocks that see each other as an "or"
        # (by __name__: Dynamo of torch 2.11 does not know the __qualname__ of a closure)
        if not use_vmap and mask_function.__name__ == "and_mask":  # pyright: ignore[reportOptionalMemberAccess]  # transformers always passes a mask function here
            return MAYBE_PACKED
        use_vmap = True
    if use_vmap:
        raise NotImplementedError(
            "softpick attention takes causal masks, packed rows and padding only"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError(
            "softpick attention does not attend in chunks (attention_chunk_size)"
        )
    stop = q_offset + q_length - kv_offset
    padding = None
    if attention_mask is not None:
        # [B, columns], True where a key is not padding
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if not is_static:
        # a generation step goes to the decoding operators, which take ranges
        is_step = q_length < kv_length and not torch.is_grad_enabled()
        if stop == kv_length and not is_step and (padding is None or bool(padding.all())):
            return None
        whole = [(0, stop)] * batch_size
        bounds = whole if padding is None else _runs(padding[:, :stop].cpu())
        starts, ends = (
            torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*bounds, strict=True)
        )
        return KeyRanges(starts, ends, stop, bounds)  # pyright: ignore[reportArgumentType]  # q_offset is an int here, so stop is one
    # static cache: read nothing back during capture; the start of each row is its first unmasked column
    ends = stop.to(torch.int32).expand(batch_size)  # pyright: ignore[reportAttributeAccessIssue]  # q_offset is a tensor here, so stop is one
    starts = torch.zeros_like(ends)
    if padding is not None:
        starts = padding.int().argmax(1).to(torch.int32)
    return KeyRanges(starts.contiguous(), ends.contiguous(), stop, None)


def _runs(padding: torch.Tensor) -> list[tuple[int, int]]:
    """First and one past the last true column of each row ``[B, columns]``, which must be true in between."""
    bounds = []
    for row in padding:
        columns = row.nonzero().flatten()
        first, end = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        if end - first != len(columns):
            raise NotImplementedError(
                "softpick attention takes rows padded on one side; attention_mask has zeros between ones"
            )
        bounds.append((first, end))
    return bounds


def num_visible_keys(
    B: int,
    T: int,
    S: int,
    ranges: KeyRanges | torch.Tensor | MaskSentinel | None,
    cu_seqlens: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Number of keys that each of ``T`` queries sees, itself included: ``[1 or B, T]`` integers, at least 1.

    Args:
        B: Rows of the batch.
        T: Queries of a row.
        S: Keys of a row; without ``ranges`` the queries are the last of them.
        ranges: The keys of each row.
        cu_seqlens: Bounds ``[N + 1]`` of the sequences packed in ``B`` rows laid end to end, ``S == T``.
        device: Device of the result.
    """
    if cu_seqlens is not None:
        positions = torch.arange(B * T, device=device)
        sequences = torch.searchsorted(cu_seqlens.to(positions), positions, right=True) - 1
        return (positions - cu_seqlens[sequences] + 1).view(B, T)
    positions = torch.arange(T, device=device)
    if not isinstance(ranges, KeyRanges):
        return (S - T + positions + 1)[None]
    # a query that is padding sees none, and its output is not used
    return (ranges.stop - T + positions - ranges.starts[:, None] + 1).clamp(min=1)


def attend_key_ranges(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: KeyRanges,
    *,
    operator: Callable[..., Any],
    normalizer: str,
    is_triton: bool,
    scale: float | None,
    window_size: int | None,
    sink_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Causal attention of each row of a batch over the keys of its range; 0 for queries that are padding.

    Args:
        q: Queries ``[B, T, HQ, K]``.
        k: Keys ``[B, S, H, K]``.
        v: Values ``[B, S, H, V]``.
        ranges: The columns of ``k`` and ``v`` that belong to each row.
        operator: Attention whose queries are the last positions of the keys.
        normalizer: A key of `fla.ops.attn.softpick.NORMALIZERS`, that of ``operator``.
        is_triton: Decode with the Triton operator instead of the reference.
        scale: Factor on ``q @ k.T``; None: ``K ** -0.5``.
        window_size: A query sees itself and the ``window_size - 1`` keys before it; None: all.
        sink_bias: A score of each query head ``[HQ]`` that takes weight and has no value, or None.

    Returns:
        ``[B, T, HQ, V]``.

    Raises:
        NotImplementedError: A static cache gets too many queries, or needs a gradient.
    """
    T, HQ, H = q.shape[1], q.shape[2], k.shape[2]
    options = {"window_size": window_size, "sink_bias": sink_bias}
    is_decoding = not torch.is_grad_enabled() and k.shape[1] > T and T * (HQ // H) <= MAX_ROWS
    if ranges.bounds is None or (is_decoding and all(e == ranges.stop for _, e in ranges.bounds)):
        decode = normalized_attn_decode if is_triton else naive_normalized_attn_decode
        if ranges.bounds is None and not is_decoding:
            raise NotImplementedError(
                "after its first call, softpick attention with a static cache takes no gradients and at most "
                f"{MAX_ROWS} query rows (query tokens times query heads per key head), got {T} x {HQ // H}"
            )
        options |= {"normalizer": normalizer, "starts": ranges.starts}
        if _reads is None:
            return decode(q, k, v, ranges.ends, scale, **options)  # pyright: ignore[reportReturnType]  # without return_lse and return_stats the result is one tensor
        o, share = _decode_and_count(q, k, v, ranges, scale, is_triton=is_triton, **options)
        _reads.add(share)
        return o
    if all(bound == (0, ranges.stop) for bound in ranges.bounds):
        return operator(q, k[:, : ranges.stop], v[:, : ranges.stop], scale, **options)
    queries = ranges.queries(T)
    if ranges.stop == T:
        # all rows at once, as packed sequences
        rows = [torch.arange(a, b, device=q.device) + i * T for i, (a, b) in enumerate(queries)]
        rows = torch.cat(rows)
        lengths = torch.tensor([0, *(b - a for a, b in queries)], dtype=torch.int32)
        packed = [x[:, :T].flatten(0, 1)[rows][None] for x in (q, k, v)]
        cu_seqlens = lengths.cumsum(0, dtype=torch.int32).to(q.device)
        o = q.new_zeros(q.shape[0] * T, HQ, v.shape[-1])
        if len(rows):
            o = o.index_copy(0, rows, operator(*packed, scale, cu_seqlens, **options)[0])
        return o.unflatten(0, (q.shape[0], T))
    outputs = []
    for i, ((a, b), (first, end)) in enumerate(zip(queries, ranges.bounds, strict=True)):
        o = q.new_zeros(1, T, HQ, v.shape[-1])
        if a < b:
            attended = operator(
                q[i : i + 1, a:b],
                k[i : i + 1, first:end],
                v[i : i + 1, first:end],
                scale,
                **options,
            )
            o = torch.cat((o[:, :a], attended, o[:, b:]), 1)
        outputs.append(o)
    return torch.cat(outputs)


def _decode_and_count(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: KeyRanges,
    scale: float | None,
    *,
    is_triton: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of decoding and the share of the values with any weight ``[B, H]``."""
    if is_triton:
        return normalized_attn_decode(q, k, v, ranges.ends, scale, return_stats=True, **options)  # pyright: ignore[reportReturnType]  # with return_stats the result is a pair
    o = naive_normalized_attn_decode(q, k, v, ranges.ends, scale, **options)
    starts = options.pop("starts")
    # [B, HQ, T, S] -> [B, H, S]
    w = dense_attention_weights(q, k, v, ranges, scale=scale, **options)
    is_used = (w != 0).unflatten(1, (k.shape[2], -1)).any(3).any(2)
    return o, is_used.sum(-1) / (ranges.ends - starts).clamp(min=1)[:, None]


def dense_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: KeyRanges | None,
    *,
    normalizer: str,
    **options: Any,
) -> torch.Tensor:
    """Weights ``[B, HQ, T, S]`` of `attend_key_ranges`, 0 where a row has no such query or key.

    ``options`` are those of the operators.

    Raises:
        NotImplementedError: A static cache is decoded, whose ranges are not known on the host.
    """

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        _, w = naive_normalized_attn(q, k, v, normalizer=normalizer, return_weights=True, **options)
        return w

    if ranges is None:
        return dense(q, k, v)
    if ranges.bounds is None:
        raise NotImplementedError(
            "a static cache is decoded without weights: output_attentions must be off"
        )
    T = q.shape[1]
    w = q.new_zeros(q.shape[0], q.shape[2], T, k.shape[1])
    spans = zip(ranges.queries(T), ranges.bounds, strict=True)
    for i, ((a, b), (first, end)) in enumerate(spans):
        if a < b:
            row = slice(i, i + 1)
            w[row, :, a:b, first:end] = dense(q[row, a:b], k[row, first:end], v[row, first:end])
    return w
