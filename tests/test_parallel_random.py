"""Random shapes, masks, layouts, dtypes and scores against float64: one round in every run of the tests, and two
minutes of them with ``-m gpu``."""

import itertools
import time

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numerics import Inputs, check_attention, draw

from fla.ops.attn.softpick import NORMALIZERS, parallel_normalized_attn

HAS_GPU = torch.cuda.is_available()
SECONDS = 120
LENGTHS = st.integers(1, 600 if HAS_GPU else 70)
# those that models have, and any other
HEAD_DIMS = (
    st.sampled_from([16, 32, 64, 80, 96, 128, 256]) | st.integers(1, 256)
    if HAS_GPU
    else st.sampled_from([16, 32, 64]) | st.integers(1, 64)
)


@st.composite
def calls(draw_):
    """Inputs and keyword arguments of one call, and whether rows are parts of longer ones, as in a fused
    projection."""
    G, H, T = draw_(st.integers(1, 4)), draw_(st.integers(1, 2)), draw_(LENGTHS)
    kind = draw_(st.sampled_from(["square", "chunk", "packed"]))
    # without a GPU at most eight heads in all, since each costs as much as the first
    B = 1 if kind == "packed" or not HAS_GPU and G * H > 4 else draw_(st.integers(1, 2))
    S = draw_(LENGTHS) + draw_(st.sampled_from([0, T])) if kind == "chunk" else T
    head_first = draw_(st.booleans())
    dtype = draw_(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    inputs = draw(
        T,
        draw_(HEAD_DIMS),
        B=B,
        HQ=G * H,
        H=H,
        S=S,
        V=draw_(HEAD_DIMS),
        head_first=head_first,
        dtype=dtype,
    )
    # scores from tiny to far beyond what float32 can exponentiate
    inputs = inputs._replace(q=inputs.q * draw_(st.sampled_from([0.1, 1.0, 1.0, 10.0, 200.0])))
    kwargs = {
        "normalizer": draw_(st.sampled_from(list(NORMALIZERS))),
        "head_first": head_first,
        "window_size": draw_(st.none() | st.integers(0, 2 * S)),
    }
    if kind == "packed":
        cuts = sorted(draw_(st.lists(st.integers(0, T), max_size=6)))
        kwargs["cu_seqlens"] = torch.tensor([0, *cuts, T])
    if draw_(st.booleans()):
        kwargs["sink_bias"] = torch.linspace(-3, draw_(st.sampled_from([3.0, 100.0])), G * H)
    return inputs, kwargs, draw_(st.booleans())


def check_random_calls(device, seconds, examples=20 if HAS_GPU else 14):
    @given(calls())
    def check(call):
        inputs, kwargs, is_strided = call
        inputs = inputs.to(device)
        if is_strided:
            # on the device, since moving a view would make it contiguous
            inputs = Inputs(*(torch.cat([x, x], -1)[..., : x.shape[-1]] for x in inputs))
        kwargs = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()
        }
        check_attention(parallel_normalized_attn, inputs, **kwargs)

    check = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(check)
    # rounds, since a test of hypothesis ends by number and not by time
    start = time.monotonic()
    for round_ in itertools.count():
        seed(round_)(check)()
        if time.monotonic() - start > seconds:
            return


def test_a_few_random_calls(device):
    check_random_calls(device, 0, examples=20 if HAS_GPU else 2)


@pytest.mark.slow
def test_random_calls(device):
    check_random_calls(device, 0)


@pytest.mark.gpu
def test_two_minutes_of_random_calls(device):
    check_random_calls(device, SECONDS)
