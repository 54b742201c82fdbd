"""The Triton operators with inputs and gradients of any strides, in both layouts, through descriptors and pointers."""

import pytest
import torch
import torch.nn.functional as F
from numerics import Inputs, check_attention, draw, quick_normalizers, with_slow

from fla.ops.attn.softpick import parallel_normalized_attn
from fla.ops.attn.softpick.tiles import row_descriptor


def check(inputs, device, **kwargs):
    return check_attention(parallel_normalized_attn, inputs.to(device), **kwargs)


@pytest.mark.parametrize(
    "shape",
    with_slow([{"T": 65}, {"T": 5, "S": 70}], [{"T": 5, "S": 70}]),
    ids=["square", "chunk"],
)
@quick_normalizers("softpick")
def test_head_first(normalizer, shape, device):
    inputs = draw(**shape, B=2, HQ=2, H=1, K=8, V=24, head_first=True)
    check(inputs, device, normalizer=normalizer, head_first=True)


def fused_qkv(T, device):
    qkv = draw(T, K=60, HQ=2, device=device).q
    return qkv[..., :20], qkv[..., 20:40], qkv[..., 40:]


def transposed(T, device):
    return (x.transpose(1, 2) for x in draw(T, HQ=2, head_first=True, device=device)[:3])


def last_dimension_strided(T, device):
    return (x[..., ::2] for x in draw(T, K=40, HQ=2, device=device)[:3])


def time_outermost(T, device):
    return (x.transpose(0, 1) for x in draw(2, B=T, HQ=2, device=device)[:3])


def one_head_expanded(T, device):
    return (x.expand(-1, -1, 2, -1) for x in draw(T, HQ=1, device=device)[:3])


def one_row_expanded(T, device):
    return (x.expand(2, -1, -1, -1) for x in draw(T, HQ=2, device=device)[:3])


@pytest.mark.parametrize(
    "view",
    [
        fused_qkv,
        transposed,
        last_dimension_strided,
        time_outermost,
        one_head_expanded,
        one_row_expanded,
    ],
)
@pytest.mark.parametrize("normalizer", with_slow(["softpick", "softmax"], ["softpick"]))
def test_strided_inputs(normalizer, view, device):
    q, k, v = view(40, device)
    do = torch.randn(q.shape[:-1] + v.shape[-1:], generator=torch.Generator().manual_seed(0))
    check(Inputs(q, k, v, do), device, normalizer=normalizer)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda do: do[:, :1, :1, :1].expand_as(do), id="one-number"),
        pytest.param(lambda do: do[:, :, :1].expand_as(do), id="one-head"),
        pytest.param(lambda do: do.transpose(1, 3).contiguous().transpose(1, 3), id="transposed"),
        pytest.param(lambda do: torch.cat([do, do], -1)[..., ::2], id="every-second"),
    ],
)
@pytest.mark.parametrize("head_first", with_slow([False, True], [False]))
def test_strided_output_gradient(head_first, view, device):
    inputs = draw(20, HQ=2, V=12, head_first=head_first)
    inputs = inputs._replace(do=view(inputs.do))
    check(inputs, device, normalizer="softpick", head_first=head_first)


# heads start at multiples of 16 bytes, as descriptors ask, or not
@pytest.mark.parametrize("width", with_slow([128, 132], [128]), ids=["descriptors", "pointers"])
@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="dense"),
        pytest.param({"head_first": True}, id="head-first"),
        pytest.param({"cu_seqlens": torch.tensor([0, 70, 70, 170])}, id="packed"),
        pytest.param({"window_size": 90}, id="window"),
    ],
)
def test_streamed_tiles(kwargs, width, device):
    inputs = draw(
        170, 128, HQ=2, H=1, dtype=torch.bfloat16, head_first=kwargs.get("head_first", False)
    )
    # to the device first, since moving a view would make it contiguous
    inputs = Inputs(*(F.pad(x.to(device), (0, width - 128))[..., :128] for x in inputs))
    kwargs = {name: x.to(device) if name == "cu_seqlens" else x for name, x in kwargs.items()}
    descriptor = row_descriptor(inputs.q, kwargs.get("head_first", False), 64, 128)
    assert (descriptor is None) == (width == 132)
    check(inputs, device, normalizer="softpick", **kwargs)
