"""Decoding against the reference of each sequence alone: caches of every kind, splits, and what is not read."""

import math

import pytest
import torch
from numerics import assert_no_worse_than_eager, each_case, quick_normalizers, with_slow

from fla.ops.attn.softpick import (
    decoding_kernels,
    naive_normalized_attn,
    naive_normalized_attn_decode,
)
from fla.ops.attn.softpick.decoding import normalized_attn_decode, softpick_attn_decode
from fla.ops.attn.softpick.naive import EPS


def draw(
    lengths, *, S=None, T=1, HQ=2, H=2, K=16, V=None, dtype=torch.float32, device="cpu", seed=0
):
    """q, k, v with batch rows of the given lengths in a cache of S places, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    B, S = len(lengths), S or max(max(lengths), T)
    shapes = (B, T, HQ, K), (B, S, H, K), (B, S, H, V or K)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    # what lies beyond a sequence must not be read
    for x in (k, v):
        for row, length in zip(x, lengths, strict=True):
            row[length:] = float("nan")
    return q, k, v, torch.tensor(lengths, dtype=torch.int32, device=device)


def reference(q, k, v, lengths, **kwargs):
    return torch.cat(
        [
            naive_normalized_attn(
                q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], **kwargs
            )
            for b, length in enumerate(lengths.tolist())
        ]
    )


def paged(x, lengths, page_size):
    """A cache [B, S, H, D] as pages in random order, unused ones full of NaN, and the block table."""
    B, S, H, D = x.shape
    num = -(-S // page_size)
    order = torch.randperm(B * num + 3, generator=torch.Generator().manual_seed(1)).to(x.device)
    pages = x.new_full((B * num + 3, page_size, H, D), float("nan"))
    table = order[: B * num].view(B, num).to(torch.int32)
    for b in range(B):
        for i in range(num):
            piece = x[b, i * page_size : (i + 1) * page_size]
            pages[table[b, i], : len(piece)] = piece
    return pages, table


def check(inputs, got, **kwargs):
    q, k, v, lengths = inputs
    eager = reference(q, k, v, lengths, **kwargs)
    double = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
    gold = reference(q.double(), k.double(), v.double(), lengths, **double)
    assert_no_worse_than_eager("o", got, eager, gold)


CASES = {
    "one token": {"lengths": [70]},
    "ragged": {"lengths": [1, 49, 32, 33]},
    "empty sequence": {"lengths": [0, 5]},
    "several tokens": {"lengths": [20, 3, 50], "T": 3},
    "more tokens than keys": {"lengths": [2, 9], "T": 4, "S": 16},
    "grouped heads": {"lengths": [90, 33], "HQ": 8, "H": 2},
    "one key head": {"lengths": [90], "HQ": 17, "H": 1},
    "several tiles of rows": {"lengths": [90, 30], "HQ": 3, "H": 1, "T": 11},
    "odd sizes": {"lengths": [77, 20], "K": 24, "V": 10},
    "room in the cache": {"lengths": [40, 80], "S": 200},
}


@each_case(
    "case", CASES, softpick=CASES, softmax=("ragged", "several tokens"), others=("several tokens",)
)
@pytest.mark.parametrize("splits", with_slow([1, 3], [3]))
def test_decode(case, normalizer, splits, device, monkeypatch):
    monkeypatch.setattr(decoding_kernels, "num_splits", lambda *_: splits)
    inputs = draw(**CASES[case], device=device)
    check(inputs, normalized_attn_decode(*inputs, normalizer=normalizer), normalizer=normalizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_decode_in_16_bits(normalizer, dtype, device):
    inputs = draw([300, 77], HQ=4, H=2, K=32, dtype=dtype, device=device)
    check(inputs, normalized_attn_decode(*inputs, normalizer=normalizer), normalizer=normalizer)


def test_decode_of_many_rows_in_16_bits(device):
    # tiles of 32 rows and more, of which the last is not full
    inputs = draw([70], T=9, HQ=8, H=1, K=32, dtype=torch.bfloat16, device=device)
    check(inputs, softpick_attn_decode(*inputs))


@pytest.mark.parametrize("page_size", with_slow([16, 20, 64], [20, 64]))
@pytest.mark.parametrize("head_first", with_slow([False, True], [True]))
def test_decode_from_pages(page_size, head_first, device):
    q, k, v, lengths = draw([90, 0, 33], HQ=4, H=2, V=24, device=device)
    k_pages, table = paged(k, lengths, page_size)
    v_pages, _ = paged(v, lengths, page_size)
    # places beyond a sequence's pages may hold anything
    for row, length in zip(table, lengths.tolist(), strict=True):
        row[-(-length // page_size) :] = 2**30
    given = (q, k_pages, v_pages)
    if head_first:
        given = [x.transpose(1, 2) for x in given]
    o = softpick_attn_decode(*given, lengths, head_first=head_first, block_table=table)
    check((q, k, v, lengths), o.transpose(1, 2) if head_first else o)


@pytest.mark.parametrize("window_size", with_slow([0, 1, 7, 64, 1000], [0, 7, 64]))
def test_decode_in_a_window(window_size, device):
    inputs = draw([100, 30, 4], T=2, device=device)
    q, k, v, lengths = inputs
    o = softpick_attn_decode(*inputs, window_size=window_size)
    check(inputs, o, window_size=window_size)


@pytest.mark.parametrize("window_size", [None, 20])
@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
def test_decode_of_rows_padded_on_the_left(normalizer, window_size, device):
    q, k, v, lengths = draw([100, 30, 81], T=2, device=device)
    # the numbers of a sequence need not lie side by side
    pairs = torch.stack([torch.tensor([70, 0, 80], device=device), lengths], 1)
    starts, lengths = pairs.unbind(1)
    # what is trimmed off must not be read
    trimmed = [torch.zeros_like(x) for x in (k, v)]
    for b, start in enumerate(starts.tolist()):
        for x, y in zip((k, v), trimmed, strict=True):
            y[b, : x.shape[1] - start] = x[b, start:]
            x[b, :start] = float("nan")
    options = {"normalizer": normalizer, "window_size": window_size}
    o = normalized_attn_decode(q, k, v, lengths, starts=starts, **options)
    check((q, *trimmed, lengths - starts), o, **options)
    naive = naive_normalized_attn_decode(q, k, v, lengths, starts=starts, **options)
    torch.testing.assert_close(o, naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("dtype", with_slow([torch.int32, torch.int64], [torch.int64]))
def test_lengths_beyond_the_cache_count_as_its_end(is_paged, dtype, device):
    q, k, v, lengths = draw([64, 64, 64, 0], HQ=1, H=1, T=2, device=device)
    arguments, options = [k, v], {}
    if is_paged:
        (k_pages, table), (v_pages, _) = (paged(x, lengths, 16) for x in (k, v))
        # what lies behind the table must not be read either
        behind = torch.full((len(table), 3), 2**30, dtype=table.dtype, device=device)
        options["block_table"] = torch.cat((table, behind), 1)[:, : table.shape[1]]
        arguments = [k_pages, v_pages]
    else:
        # rows behind the cache hold NaN
        wide = [torch.cat((x, torch.full_like(x, float("nan"))), 1) for x in (k, v)]
        arguments = [x[:, : k.shape[1]] for x in wide]
    far = torch.iinfo(dtype).max
    given = torch.tensor([65, 1000, far, -5], dtype=dtype, device=device)
    o, share = softpick_attn_decode(q, *arguments, given, **options, return_stats=True)
    expected, expected_share = softpick_attn_decode(
        q, *arguments, lengths, **options, return_stats=True
    )
    assert torch.equal(o, expected)
    assert torch.equal(share, expected_share)
    if not is_paged:
        assert torch.equal(
            naive_normalized_attn_decode(q, *arguments, given), reference(q, k, v, lengths)
        )


def test_pages_that_are_not_in_the_cache_are_not_read(device):
    q, k, v, lengths = draw([64], device=device)
    (k_pages, table), (v_pages, _) = (paged(x, lengths, 16) for x in (k, v))
    for page in (-1, len(k_pages), 2**31 - 1):
        table[0, 2] = page
        o = softpick_attn_decode(q, k_pages, v_pages, lengths, block_table=table)
        # without the keys of that page, whose scores of 0 neither weigh nor count
        k[:, 32:48], v[:, 32:48] = 0, 0
        check((q, k, v, lengths), o)


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
@pytest.mark.parametrize(("T", "S", "B"), [(1, 8, 0), (0, 8, 2), (2, 0, 2)])
@pytest.mark.parametrize("is_paged", [False, True])
def test_nothing_to_decode_gives_nothing_or_0(normalizer, T, S, B, is_paged, device):
    q, k = (torch.randn(B, n, 2, 16, device=device) for n in (T, S))
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    options = {"normalizer": normalizer, "return_lse": True, "return_stats": True}
    if is_paged:
        k = torch.randn(3, 4, 2, 16, device=device)
        options["block_table"] = torch.zeros(B, S // 4, dtype=torch.int32, device=device)
    o, lse, share = normalized_attn_decode(q, k, k, lengths, **options)
    assert torch.equal(o, torch.zeros(B, T, 2, 16, device=device))
    assert torch.equal(share, torch.zeros(B, 2, device=device))
    empty = math.log(EPS) if normalizer == "softpick" else -math.inf
    torch.testing.assert_close(lse, torch.full((B, 2, T), empty, device=device), rtol=1e-6, atol=0)
    if not is_paged:
        assert torch.equal(naive_normalized_attn_decode(q, k, k, lengths, normalizer=normalizer), o)


@pytest.mark.parametrize("normalizer", ["softpick", "softmax"])
@pytest.mark.parametrize("splits", with_slow([1, 2], [2]))
def test_decode_with_a_sink(normalizer, splits, device, monkeypatch):
    monkeypatch.setattr(decoding_kernels, "num_splits", lambda *_: splits)
    inputs = draw([100, 0], HQ=4, H=2, device=device)
    sink_bias = torch.tensor([-3.0, 0.0, 5.0, 90.0], device=device)
    o = normalized_attn_decode(*inputs, normalizer=normalizer, sink_bias=sink_bias)
    check(inputs, o, normalizer=normalizer, sink_bias=sink_bias)


@pytest.mark.parametrize("splits", [1, 2])
def test_lse_is_the_log_of_the_denominator(splits, device, monkeypatch):
    monkeypatch.setattr(decoding_kernels, "num_splits", lambda *_: splits)
    q, k, v, lengths = draw([60, 60], device=device)
    _, lse = softpick_attn_decode(q, k, v, lengths, return_lse=True)
    _, expected = naive_normalized_attn(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, -30.0])
@quick_normalizers("softpick", "softmax")
@pytest.mark.parametrize("splits", with_slow([1, 2], [2]))
def test_decode_of_huge_scores(normalizer, splits, scale, device, monkeypatch):
    monkeypatch.setattr(decoding_kernels, "num_splits", lambda *_: splits)
    inputs = draw([130], device=device)
    o = normalized_attn_decode(*inputs, scale, normalizer=normalizer)
    check(inputs, o, normalizer=normalizer, scale=scale)


def test_rows_of_no_weight_are_not_read(device):
    q, k, v, lengths = draw([200], HQ=4, H=2, device=device)
    _, weights = naive_normalized_attn(q, k, v, return_weights=True)
    # [B, H, S] of bool
    is_used = (weights.view(1, 2, 2, 200) > 0).any(2)
    expected, share = softpick_attn_decode(q, k, v, lengths, return_stats=True)
    torch.testing.assert_close(share, is_used.float().mean(-1))
    assert share.max() < 1
    v[~is_used.transpose(1, 2)] = float("nan")
    assert torch.equal(softpick_attn_decode(q, k, v, lengths), expected)


def test_nan_in_a_key_shows(device):
    q, k, v, lengths = draw([50, 50], device=device)
    k[0, 20, 1] = float("nan")
    o = softpick_attn_decode(q, k, v, lengths)
    assert o[0, :, 1].isnan().all()
    assert not o[0, :, 0].isnan().any()
    assert not o[1].isnan().any()


def test_decode_compiles_into_one_graph(device):
    inputs = draw([20, 5], device=device)
    compiled = torch.compile(softpick_attn_decode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), softpick_attn_decode(*inputs))


def test_opcheck(device):
    q, k, v, lengths = draw([20, 5], device=device)
    torch.library.opcheck(
        torch.ops.softpick.normalized_attn_decode,
        (q, k, v, lengths, None, None, None, 0.25, None, False, True, "softpick"),
    )


@pytest.mark.gpu
def test_decode_in_a_cuda_graph(device):
    q, k, v, lengths = draw([500, 1200], S=2000, K=64, dtype=torch.bfloat16, device=device)
    k.nan_to_num_()
    v.nan_to_num_()
    softpick_attn_decode(q, k, v, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = softpick_attn_decode(q, k, v, lengths)
    # the graph sees what the lengths are when it runs
    lengths += 100
    graph.replay()
    assert torch.equal(o, softpick_attn_decode(q, k, v, lengths))


# name -> query heads, key heads
HEADS = {"MHA": (4, 4), "GQA 8": (16, 2), "MQA 32": (32, 1)}


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("rows", [1, 8, 16, 17, 33, 64, 100, 128])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("is_paged", [False, True])
def test_decode_of_rows_at_real_size(rows, heads, K, is_paged, device):
    HQ, H = heads
    T = -(-rows // (HQ // H))
    inputs = draw([3000, 513, T], T=T, HQ=HQ, H=H, K=K, dtype=torch.bfloat16, device=device)
    q, k, v, lengths = inputs
    options = {}
    if is_paged:
        (k, options["block_table"]), (v, _) = (paged(x, lengths, 64) for x in (k, v))
    for normalizer in ("softpick", "softmax"):
        options["normalizer"] = normalizer
        o = normalized_attn_decode(q, k, v, lengths, **options)
        check(inputs, o, normalizer=normalizer)
        assert torch.equal(o, normalized_attn_decode(q, k, v, lengths, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128])
def test_decode_at_real_size(K, device):
    inputs = draw([5000, 8192, 1, 777], HQ=8, H=2, K=K, dtype=torch.bfloat16, device=device)
    first = softpick_attn_decode(*inputs)
    check(inputs, first)
    assert torch.equal(first, softpick_attn_decode(*inputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": torch.tensor([1, 2, 3])}, r"lengths must be int32 or int64 \[2\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, r"lengths must be int32 or int64 .* torch.float32"),
        ({"q": torch.randn(2, 70, 4, 16), "k": torch.randn(2, 80, 2, 16), "v": torch.randn(2, 80, 2, 16)}, r"at most 128 query rows .* 70 x 2"),
        ({"k": torch.randn(2, 20, 2, 8)}, r"k must have the last dimension of q, 16, got 8"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"block_table must be int32 or int64 \[2, pages"),
        ({"starts": torch.tensor([1])}, r"starts must be int32 or int64 \[2\]"),
        ({"window_size": -1}, r"window_size must be at least 0"),
        ({"lengths": torch.tensor([21, 9]), "check_bounds": True}, r"lengths must be between 0 and .* 20, got 21 for sequence 0"),
        ({"lengths": torch.tensor([20, -1]), "check_bounds": True}, r"lengths must be .* got -1 for sequence 1"),
        ({"starts": torch.tensor([0, 10]), "check_bounds": True}, r"starts must be .* 9, got 10 for sequence 1"),
        ({"lengths": torch.tensor([41, 9]), "block_table": torch.tensor([[0, 1], [0, 2]]), "check_bounds": True}, r"capacity of the cache, 40, got 41"),
        ({"block_table": torch.tensor([[1, 2], [2, 7]]), "check_bounds": True}, r"block_table must name pages from 0 to 1, got 2 for sequence 1"),
        ({"v": torch.randn(2, 20, 16, 2).transpose(2, 3)}, r"v must be contiguous in its last dimension"),
        ({"q": torch.randn(2, 1, 4, 16, requires_grad=True)}, r"must not require gradients"),
        ({"normalizer": "hardmax"}, r"normalizer must be one of softpick, .* 'hardmax'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(changed, message, device):
    inputs = dict(zip(("q", "k", "v", "lengths"), draw([20, 9], HQ=4, H=2), strict=True))
    arguments = {
        name: x.detach().to(device).requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in (inputs | changed).items()
    }
    with pytest.raises(ValueError, match=message):
        normalized_attn_decode(**arguments)


@pytest.mark.parametrize(
    ("heads", "S", "splits"),
    [
        # 264 places: half of a round, a round, nearly a round, two rounds of a split each
        (128, 10**6, 2),
        (8, 10**6, 32),
        (512, 10**6, 1),
        # one round would leave 64 places idle, three rounds none
        (200, 10**6, 5),
        (8, 4096, 16),
        (1, 1, 1),
        (10**5, 10**6, 1),
    ],
)
def test_splits_fill_the_gpu_in_whole_rounds(heads, S, splits):
    assert decoding_kernels.num_splits(heads, S, 264) == splits
