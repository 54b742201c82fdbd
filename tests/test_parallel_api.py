"""The Triton operators as PyTorch sees them: registration, compilation, autograd, names."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from numerics import Inputs, draw, outputs_and_gradients
from torch.utils.checkpoint import checkpoint

import fla.ops.attn.softpick as package
from fla.ops.attn.softpick import (
    NORMALIZERS,
    naive_normalized_attn,
    parallel,
    parallel_normalized_attn,
    parallel_softpick_attn,
)
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS
from fla.ops.attn.softpick.parallel_fwd import dot_precision

each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def assert_bitwise(got, expected):
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def run(attn, inputs, **kwargs):
    return list(outputs_and_gradients(attn, inputs, **kwargs).values())


def test_kernels_know_the_normalizers_of_the_reference():
    assert tuple(NORMALIZERS) == KERNEL_NORMALIZERS


@pytest.mark.parametrize("kind", ["naive", "parallel"])
def test_every_normalizer_has_its_named_function(kind):
    general = inspect.signature(getattr(package, f"{kind}_normalized_attn")).parameters
    for normalizer in NORMALIZERS:
        name = f"{kind}_{normalizer}_attn"
        function = getattr(package, name)
        assert name in package.__all__
        assert function.__name__ == name
        assert normalizer in function.__doc__
        parameters = inspect.signature(function).parameters
        assert list(parameters) == [x for x in general if x != "normalizer"]
        assert all(p.default == general[x].default for x, p in parameters.items())


@each_normalizer
def test_named_function_is_the_normalizer(normalizer, device):
    named = getattr(package, f"parallel_{normalizer}_attn")
    q, k, v, _ = draw(9, HQ=2, H=1, head_first=True, device=device)
    kwargs = {"scale": 0.3, "head_first": True, "safe": False, "return_lse": True}
    assert_bitwise(
        named(q, k, v, **kwargs),
        parallel_normalized_attn(q, k, v, normalizer=normalizer, **kwargs),
    )


def views(kind, device):
    """Inputs, and whether heads stand before time."""
    if kind == "dense":
        return draw(9, HQ=4, H=2, V=24, device=device), False
    if kind == "head-first":
        return draw(4, HQ=2, S=9, head_first=True, device=device), True
    if kind == "transposed":
        x = draw(9, HQ=2, head_first=True, device=device)
        return Inputs(*(y.transpose(1, 2) for y in x)), False
    if kind == "fused":
        x = draw(9, K=48, V=16, HQ=2, device=device)
        return Inputs(*x.q.split(16, -1), x.do), False
    x = draw(9, HQ=1, device=device)
    return Inputs(*(y.expand(2, -1, 3, -1) for y in x[:3]), x.do.repeat(2, 1, 3, 1)), False


@pytest.mark.parametrize("kind", ["dense", "head-first", "transposed", "fused", "expanded"])
def test_opcheck(kind, device):
    (q, k, v, do), head_first = views(kind, device)
    forward, backward = (
        torch.ops.softpick.normalized_attn_fwd,
        torch.ops.softpick.normalized_attn_bwd,
    )
    args = 0.25, head_first, True, "softpick"
    torch.library.opcheck(forward, (q, k, v, *args))
    torch.library.opcheck(forward, (*(x.detach().requires_grad_() for x in (q, k, v)), *args))
    o, lse = forward(q, k, v, *args)
    for dlse in (None, torch.ones_like(lse)):
        torch.library.opcheck(backward, (q, k, v, o, lse, do, dlse, 0.25, head_first, "softpick"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic, device):
    def attn(q, k, v, **kwargs):
        o, lse = parallel_softpick_attn(q * 2, k, v, return_lse=True, **kwargs)
        return o + lse.transpose(1, 2)[..., None]

    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (33, 40):
        inputs = draw(T, HQ=2, H=1, device=device)
        assert_bitwise(run(compiled, inputs, safe=False), run(attn, inputs, safe=False))


def test_activation_checkpointing(device):
    inputs = draw(33, HQ=2, device=device)

    def attn(q, k, v):
        return checkpoint(parallel_softpick_attn, q, k, v, use_reentrant=False)

    assert_bitwise(run(attn, inputs), run(parallel_softpick_attn, inputs))


def test_double_backward_is_refused(device):
    q, k, v, do = draw(9, device=device)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(parallel_softpick_attn(q, k, v), q, do, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative in Triton"):
        dq.sum().backward()


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradient_of_one_input_alone(wanted, device):
    inputs = draw(33, device=device)
    gradients = outputs_and_gradients(parallel_softpick_attn, inputs)
    tensors = dict(zip("qkv", (x.clone() for x in inputs[:3]), strict=True))
    tensors[wanted].requires_grad_()
    parallel_softpick_attn(**tensors).backward(inputs.do)
    assert torch.equal(tensors[wanted].grad, gradients["d" + wanted])


def test_inputs_stay_as_they_are(device):
    inputs = draw(33, HQ=2, device=device)
    before = [x.clone() for x in inputs]
    run(parallel_softpick_attn, inputs)
    assert_bitwise(list(inputs), before)


@pytest.mark.parametrize("head_first", [False, True])
def test_output_is_contiguous_in_the_layout_given(head_first, device):
    q, k, v, _ = draw(33, HQ=2, V=24, B=2, head_first=head_first, device=device)
    o = parallel_softpick_attn(
        q.to(torch.bfloat16), k.bfloat16(), v.bfloat16(), head_first=head_first
    )
    assert o.shape == v.shape
    assert o.dtype == torch.bfloat16
    assert o.is_contiguous()


@pytest.mark.parametrize("attn", [parallel_normalized_attn, naive_normalized_attn])
def test_autocast_casts_the_inputs(attn, device):
    inputs = draw(33, HQ=2, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        o = attn(*inputs[:3])
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, attn(*inputs.to(torch.bfloat16)[:3]))


def test_autocast_leaves_float64():
    q, k, v, _ = draw(9, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert naive_normalized_attn(q, k, v).dtype == torch.float64


def test_output_gradient_with_steps_too_wide_is_copied(device, monkeypatch):
    inputs = draw(33, HQ=2, head_first=True, device=device)
    wide = inputs._replace(do=torch.cat([inputs.do, inputs.do], -1)[..., :16])
    launch, steps = parallel.parallel_normalized_attn_bwd, []

    def spy(q, k, v, o, lse, do, *args):
        steps.append(do.stride(2))
        return launch(q, k, v, o, lse, do, *args)

    monkeypatch.setattr(parallel, "parallel_normalized_attn_bwd", spy)
    expected = run(parallel_softpick_attn, wide, head_first=True)
    monkeypatch.setattr(parallel, "MAX_TIME_STRIDE", 16)
    assert_bitwise(run(parallel_softpick_attn, wide, head_first=True), expected)
    assert steps == [32, 16]


def test_float32_precision_follows_torch():
    previous = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert dot_precision(torch.float32) == precision
            assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(previous)


def test_cpu_tensor_without_interpreter_is_refused():
    # in another process, since Triton reads the variable when kernels are defined
    program = (
        "import torch\n"
        "from fla.ops.attn import parallel_softpick_attn\n"
        "q = torch.zeros(1, 2, 1, 16)\n"
        "parallel_softpick_attn(q, q, q)\n"
    )
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "ValueError: q must be on a GPU" in result.stderr
    assert "naive_..._attn" in result.stderr
