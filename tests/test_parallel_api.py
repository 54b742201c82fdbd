"""The Triton operators as PyTorch sees them: registration, compilation, autograd, names."""

import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from numerics import Inputs, draw, outputs_and_gradients, with_slow
from torch.utils.checkpoint import checkpoint

import fla.ops.attn.softpick as package
from fla.ops.attn.softpick import (
    NORMALIZERS,
    naive_normalized_attn,
    naive_softmax_attn,
    parallel,
    parallel_normalized_attn,
    parallel_softpick_attn,
)
from fla.ops.attn.softpick.launch_shapes import TABLE, dot_precision
from fla.ops.attn.softpick.normalizers import KERNEL_NORMALIZERS

each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)


def assert_bitwise(got, expected):
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def run(attn, inputs, **kwargs):
    return list(outputs_and_gradients(attn, inputs, **kwargs).values())


def test_kernels_know_the_normalizers_of_the_reference():
    assert tuple(NORMALIZERS) == KERNEL_NORMALIZERS


@pytest.mark.parametrize("operator", ["naive_{}_attn", "parallel_{}_attn", "{}_attn_decode"])
@each_normalizer
def test_every_normalizer_has_its_named_function(normalizer, operator):
    general = getattr(package, operator.format("normalized"))
    name = operator.format(normalizer)
    function = getattr(package, name)
    assert name in package.__all__
    assert (function.__name__, function.__qualname__) == (name, name)
    assert function.__module__ == general.__module__
    assert pickle.loads(pickle.dumps(function)) is function
    assert "def " in inspect.getsource(function)
    assert normalizer in function.__doc__
    expected = inspect.signature(general)
    parameters = [x for x in expected.parameters.values() if x.name != "normalizer"]
    assert inspect.signature(function) == expected.replace(parameters=parameters)


def test_a_named_function_refuses_what_it_does_not_take():
    q, k, v, _ = draw(4)
    for kwargs in ({"windowsize": 4}, {"normalizer": "softmax"}):
        with pytest.raises(TypeError, match=next(iter(kwargs))):
            naive_softmax_attn(q, k, v, **kwargs)


def test_named_functions_compile_apart():
    # one code object for all of them would meet the limit of recompilations
    q, k, v, _ = draw(9, HQ=2, H=1)
    torch.compiler.reset()
    for normalizer in NORMALIZERS:
        named = getattr(package, f"naive_{normalizer}_attn")
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            got = torch.compile(named, fullgraph=True, backend="eager")(q, k, v)
        assert torch.equal(got, named(q, k, v))


@each_normalizer
def test_named_function_is_the_normalizer(normalizer, device):
    named = getattr(package, f"parallel_{normalizer}_attn")
    q, k, v, _ = draw(9, HQ=2, H=1, head_first=True, device=device)
    kwargs = {"scale": 0.3, "head_first": True, "safe": False, "return_lse": True}
    kwargs |= {"window_size": 4, "sink_bias": torch.ones(2, device=device)}
    kwargs["cu_seqlens"] = torch.tensor([0, 6, 9], device=device)
    assert_bitwise(
        named(q, k, v, **kwargs),
        parallel_normalized_attn(q, k, v, normalizer=normalizer, **kwargs),
    )


def views(kind, device):
    """Inputs, and whether heads stand before time."""
    if kind == "dense":
        return draw(9, HQ=2, H=1, V=24, device=device), False
    if kind == "head-first":
        return draw(4, HQ=2, S=9, head_first=True, device=device), True
    if kind == "transposed":
        x = draw(9, HQ=2, head_first=True, device=device)
        return Inputs(*(y.transpose(1, 2) for y in x)), False
    if kind == "fused":
        x = draw(9, K=48, V=16, HQ=2, device=device)
        return Inputs(*x.q.split(16, -1), x.do), False
    x = draw(9, HQ=1, device=device)
    return Inputs(*(y.expand(2, -1, 2, -1) for y in x[:3]), x.do.repeat(2, 1, 2, 1)), False


@pytest.mark.parametrize("has_sink", with_slow([True, False], [True]), ids=["sink", "no-sink"])
@pytest.mark.parametrize(
    "kind",
    with_slow(["dense", "head-first", "transposed", "fused", "expanded"], ["dense", "head-first"]),
)
def test_opcheck(kind, has_sink, device):
    (q, k, v, do), head_first = views(kind, device)
    forward, backward = (
        torch.ops.softpick.normalized_attn_fwd,
        torch.ops.softpick.normalized_attn_bwd,
    )
    sink_bias = torch.zeros(q.shape[1 if head_first else 2], device=device) if has_sink else None
    args = None, 0.25, None, head_first, True, "softpick"
    inputs = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, sink_bias)]
    torch.library.opcheck(forward, (*inputs, *args))
    o, lse = forward(q, k, v, sink_bias, *args)
    # the gradient of lse comes with a sink or not at all
    dlse = torch.ones_like(lse) if has_sink else None
    torch.library.opcheck(
        backward,
        (q, k, v, sink_bias, None, o, lse, do, dlse, 0.25, 4, head_first, "softpick"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("has_sink", [True, False], ids=["sink", "no-sink"])
def test_opcheck_without_gradients(has_sink, device):
    q, k, v, _ = draw(9, HQ=2, H=1, V=24, device=device)
    sink_bias = torch.zeros(2, device=device) if has_sink else None
    args = None, 0.25, None, False, True, "softpick"
    torch.library.opcheck(torch.ops.softpick.normalized_attn_fwd, (q, k, v, sink_bias, *args))


def test_opcheck_of_packed_sequences(device):
    q, k, v, do = draw(20, device=device)
    cu_seqlens = torch.tensor([0, 5, 5, 20], device=device)
    args = 0.25, 4, False, True, "softmax"
    forward = torch.ops.softpick.normalized_attn_fwd
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(forward, (*inputs, None, cu_seqlens, *args))
    o, lse = (x.detach() for x in forward(*inputs, None, cu_seqlens, *args))
    torch.library.opcheck(
        torch.ops.softpick.normalized_attn_bwd,
        (
            *(x.detach() for x in inputs),
            None,
            cu_seqlens,
            o,
            lse,
            do,
            None,
            0.25,
            4,
            False,
            "softmax",
        ),
    )


@pytest.mark.parametrize("dynamic", with_slow([False, True], [True]))
def test_compiles_into_one_graph(dynamic, device):
    def attn(q, k, v, **kwargs):
        o, lse = parallel_softpick_attn(q * 2, k, v, return_lse=True, **kwargs)
        return o + lse.transpose(1, 2)[..., None]

    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (9, 12):
        inputs = draw(T, HQ=2, H=1, device=device)
        assert_bitwise(run(compiled, inputs, safe=False), run(attn, inputs, safe=False))


def test_activation_checkpointing(device):
    inputs = draw(20, HQ=2, device=device)

    def attn(q, k, v):
        return checkpoint(parallel_softpick_attn, q, k, v, use_reentrant=False)

    assert_bitwise(run(attn, inputs), run(parallel_softpick_attn, inputs))


def test_double_backward_is_refused(device):
    q, k, v, do = draw(9, device=device)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(parallel_softpick_attn(q, k, v), q, do, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative in Triton"):
        dq.sum().backward()


def test_vmap_is_refused(device):
    q, k, v, _ = draw(9, B=2, device=device)
    with pytest.raises(NotImplementedError, match="make the mapped dimension part of the batch"):
        torch.vmap(parallel_softpick_attn)(q[:, None], k[:, None], v[:, None])


def test_export_with_dynamic_length(device):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, sink_bias):
            return parallel_softpick_attn(q, k, v, sink_bias=sink_bias, window_size=30)

    sink_bias = torch.zeros(2, device=device)
    T = torch.export.Dim("T", min=2, max=4096)
    dynamic = tuple({1: T} for _ in "qkv") + (None,)
    args = (*draw(33, HQ=2, device=device)[:3], sink_bias)
    program = torch.export.export(Attention(), args, dynamic_shapes=dynamic)
    for length in (33, 70):
        args = (*draw(length, HQ=2, device=device)[:3], sink_bias)
        assert torch.equal(program.module()(*args), Attention()(*args))


def test_compiled_code_is_reused_for_every_length(device):
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch.compiler.reset()
    attn = torch.compile(parallel_softpick_attn, fullgraph=True, backend=backend, dynamic=True)
    for T in (5, 9, 40):
        inputs = draw(T, device=device)
        assert torch.equal(attn(*inputs[:3]), parallel_softpick_attn(*inputs[:3]))
    assert compilations == 1


def test_packed_sequences_compile_into_one_graph(device):
    attn = torch.compile(parallel_softpick_attn, fullgraph=True, backend="aot_eager")
    inputs = draw(12, HQ=2, device=device)
    for bounds in ([0, 9, 12], [0, 1, 12]):
        cu_seqlens = torch.tensor(bounds, device=device)
        got = run(attn, inputs, cu_seqlens=cu_seqlens)
        assert_bitwise(got, run(parallel_softpick_attn, inputs, cu_seqlens=cu_seqlens))


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
    backward, steps = parallel._bwd, []

    def spy(q, k, v, sink_bias, cu_seqlens, o, lse, do, *args):
        steps.append(do.stride(2))
        return backward(q, k, v, sink_bias, cu_seqlens, o, lse, do, *args)

    monkeypatch.setattr(parallel, "_bwd", spy)
    expected = run(parallel_softpick_attn, wide, head_first=True)
    monkeypatch.setattr(parallel, "MAX_TIME_STRIDE", 16)
    assert_bitwise(run(parallel_softpick_attn, wide, head_first=True), expected)
    # an operator calls itself once more, below its gradient
    assert steps == [32, 32, 16, 16]


def test_float32_precision_follows_torch():
    previous = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            for architecture in TABLE:
                # gfx90a and gfx950 have no TF32
                expected = "ieee" if architecture in ("gfx90a", "gfx950") else precision
                assert dot_precision(torch.float32, architecture) == expected
                assert dot_precision(torch.bfloat16, architecture) == "ieee"
    finally:
        torch.set_float32_matmul_precision(previous)


def test_cpu_tensor_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(parallel, "IS_INTERPRETED", False)
    q = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match=r"q must be on a GPU .*naive_\.\.\._attn"):
        parallel_softpick_attn(q, q, q)


@pytest.mark.slow
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
