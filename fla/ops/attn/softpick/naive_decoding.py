"""Dense PyTorch reference of decoding, for any device and dtype; tests compare `decoding.py` with it."""

import torch

from fla.ops.attn.softpick.checks import check_decode_inputs
from fla.ops.attn.softpick.naive import NORMALIZERS, naive_normalized_attn


def naive_normalized_attn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    head_first: bool = False,
    *,
    normalizer: str = "softpick",
    starts: torch.Tensor | None = None,
    window_size: int | None = None,
    sink_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`normalized_attn_decode` on contiguous caches, one sequence after the other, by `naive_normalized_attn`.

    Arguments and errors are those of `normalized_attn_decode`. Reads ``lengths`` and ``starts`` back to the host; any number of queries;
    differentiable.

    Returns:
        Outputs ``[B, T, HQ, V]`` (``head_first``: ``[B, HQ, T, V]``) in the dtype of ``q``; 0 for a query before
        the start of its sequence.
    """
    time, head = (2, 1) if head_first else (1, 2)
    check_decode_inputs(
        q,
        k,
        v,
        lengths,
        head_first,
        starts,
        None,
        window_size,
        sink_bias,
        normalizer,
        NORMALIZERS,
        max_rows=q.shape[time] * q.shape[head],
    )
    S = k.shape[time]
    firsts = [0] * len(lengths) if starts is None else starts.tolist()
    o = q.new_zeros(q.shape[:-1] + v.shape[-1:])
    rows = list(o.split(1))
    for b, (first, end) in enumerate(zip(firsts, lengths.tolist(), strict=True)):
        end = min(max(end, 0), S)
        first = min(max(first, 0), end)
        k_b, v_b = (x[b : b + 1].narrow(time, first, end - first) for x in (k, v))
        o_b: torch.Tensor = naive_normalized_attn(  # pyright: ignore[reportAssignmentType]  # without return_lse the result is one tensor
            q[b : b + 1],
            k_b,
            v_b,
            scale,
            head_first=head_first,
            normalizer=normalizer,
            window_size=window_size,
            sink_bias=sink_bias,
        )
        rows[b] = o_b
    return torch.cat(rows) if rows else o
