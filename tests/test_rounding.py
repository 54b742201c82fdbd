"""Rounding to bfloat16 by integer arithmetic, which the kernels do on gfx90a and gfx942, on any device."""

import pytest
import test_decoding as decoding_tests
import torch
import triton
import triton.language as tl
from numerics import check_attention, draw, outputs_and_gradients, quick_normalizers

from fla.ops.attn.softpick import kernel_choice, launch_shapes, parallel_normalized_attn
from fla.ops.attn.softpick.decoding import normalized_attn_decode
from fla.ops.attn.softpick.tiles import round_for_dot

# the lower 16 bits: the ends, and the tie with its neighbours; between them the rounding does not change
LOWER_HALVES = 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF


@pytest.fixture
def by_bits(monkeypatch):
    """Kernels launched in the test are Triton's and round by integer arithmetic."""
    monkeypatch.setattr(launch_shapes, "WITHOUT_BF16_CAST", set(launch_shapes.TABLE))
    with kernel_choice.hopper_serving("none"):
        yield


@triton.jit
def round_kernel(x, y, BS: tl.constexpr):
    at = tl.program_id(0) * BS + tl.arange(0, BS)
    tl.store(y + at, round_for_dot(tl.load(x + at), tl.bfloat16, True))


def nearest_ties_away(x: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: the nearer of the two bfloat16 around x, at a tie the one further from zero.

    2**128 counts as the successor of the largest bfloat16 and stands for inf.
    """
    magnitude = x.abs().double()
    # bfloat16 has 8 bits, and below 2**-126 the spacing of 2**-126
    exponent = torch.frexp(magnitude)[1].clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(magnitude), exponent - 8)
    below = (magnitude / unit).floor() * unit
    is_up = below + unit - magnitude <= magnitude - below
    rounded = torch.where(is_up, below + unit, below)
    rounded = torch.where(rounded == 2.0**128, float("inf"), rounded)
    return torch.where(magnitude.isinf(), magnitude, rounded).copysign(x.double())


def test_rounding_of_each_upper_half(device):
    bits = torch.arange(2**16)[:, None] * 2**16 + torch.tensor(LOWER_HALVES)
    x = bits.flatten().to(torch.uint32).view(torch.float32).to(device)
    got = torch.empty(len(x), dtype=torch.bfloat16, device=device)
    BS = 2**16
    round_kernel[(len(x) // BS,)](x, got, BS)
    x, got, bits = x.cpu(), got.cpu(), bits.flatten()
    is_number = ~x.isnan()
    expected = nearest_ties_away(x[is_number])
    # bfloat16 holds the expected values exactly; their bits tell zeros apart
    assert torch.equal(expected.to(torch.bfloat16).double(), expected)
    assert torch.equal(
        got[is_number].view(torch.int16), expected.to(torch.bfloat16).view(torch.int16)
    )
    # NaN with an extreme payload becomes inf or a zero
    payload = bits[~is_number] & 0x7FFFFFFF
    is_kept = (payload >= 0x7F808000) & (payload < 0x7FFF8000)
    assert torch.equal(got[~is_number].isnan(), is_kept)


def test_which_launches_round_by_bits(monkeypatch):
    for row in launch_shapes.TABLE:
        monkeypatch.setattr(launch_shapes, "architecture", lambda device, row=row: row)
        for dtype in torch.bfloat16, torch.float16, torch.float32:
            options = launch_shapes.launch_options("dkv", torch.empty(64, dtype=dtype), 64)
            expected = row in ("gfx90a", "gfx942") and dtype == torch.bfloat16
            assert options["ROUNDS_BY_BITS"] == expected


@pytest.mark.usefixtures("by_bits")
def test_attention(device):
    inputs = draw(70, HQ=4, H=2, dtype=torch.bfloat16).to(device)
    check_attention(parallel_normalized_attn, inputs, normalizer="softpick")


@pytest.mark.usefixtures("by_bits")
def test_decoding(device):
    inputs = q, k, v, lengths = decoding_tests.draw([70, 3], dtype=torch.bfloat16, device=device)
    arguments = {"normalizer": "softpick"}
    decoding_tests.check(inputs, normalized_attn_decode(q, k, v, lengths, **arguments), **arguments)


@pytest.mark.usefixtures("by_bits")
@pytest.mark.parametrize("source", ["sink_bias", "dlse", "q", "k", "v", "do"])
@quick_normalizers("softmax")
def test_nan_is_not_lost(normalizer, source, device):
    """NaN whose bits are all ones rounds to a zero, yet the results that depend on it are NaN."""
    inputs = draw(20, HQ=2, dtype=torch.bfloat16)
    tensors = inputs._asdict() | {"sink_bias": torch.zeros(2), "dlse": torch.zeros(1, 2, 20)}
    # the last query of the first head sees all keys
    index = {"sink_bias": 0, "dlse": (0, 0, 19), "k": (0, 3, 0, 5), "v": (0, 3, 0, 5)}
    x = tensors[source]
    x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)[
        index.get(source, (0, 19, 0, 5))
    ] = -1
    tensors = {name: x.to(device) for name, x in tensors.items()}
    inputs = type(inputs)(*(tensors.pop(name) for name in inputs._fields))
    got = outputs_and_gradients(parallel_normalized_attn, inputs, normalizer=normalizer, **tensors)
    if source not in ("dlse", "do"):
        assert got["o"][0, 19, 0].isnan().any()
    assert got["dq"][0, 19, 0].isnan().all()
    for name in "dk", "dv":
        assert got[name][0, :, 0].isnan().any(-1).all()
    for name in "o", "dq", "dk", "dv":
        assert got[name][0, :, 1].isfinite().all()
