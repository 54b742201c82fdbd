"""What holds for the Triton operators whatever the inputs are, and what was wrong in published kernels."""

import math

import pytest
import torch
from numerics import (
    FORMULAS,
    SOFTPICKS,
    Inputs,
    assert_no_worse_than_eager,
    by_formula,
    draw,
    outputs_and_gradients,
    poisoned_memory,
    quick_normalizers,
    with_slow,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from fla.ops.attn.softpick import (
    naive_normalized_attn,
    naive_softpick_attn,
    parallel_normalized_attn,
    parallel_softpick_attn,
)


def run(inputs, **kwargs):
    with poisoned_memory():
        return outputs_and_gradients(parallel_normalized_attn, inputs, **kwargs)


def assert_bitwise(got, expected):
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


@quick_normalizers("softpick")
def test_future_keys_change_nothing(normalizer, device):
    T, now = 70, 40
    inputs = draw(T, S=T + 9, device=device)
    k, v = inputs.k.clone(), inputs.v.clone()
    # what the first `now` queries cannot see
    k[:, now + 9 :] = 50
    v[:, now + 9 :] = 1e6
    past = run(inputs, normalizer=normalizer)
    changed = run(inputs._replace(k=k, v=v), normalizer=normalizer)
    for name in ("o", "dq"):
        assert torch.equal(past[name][:, :now], changed[name][:, :now]), name


@quick_normalizers("softpick")
def test_two_runs_agree_bitwise(normalizer, device):
    inputs = draw(101, HQ=2, H=1, dtype=torch.bfloat16, device=device)
    assert_bitwise(run(inputs, normalizer=normalizer), run(inputs, normalizer=normalizer))


@quick_normalizers("softpick", "softmax")
def test_batch_is_a_loop(normalizer, device):
    inputs = draw(20, B=2, HQ=2, H=1, device=device)
    rows = [run(Inputs(*(x[i : i + 1] for x in inputs)), normalizer=normalizer) for i in range(2)]
    batch = run(inputs, normalizer=normalizer)
    assert_bitwise(batch, {name: torch.cat([row[name] for row in rows]) for name in batch})


@pytest.mark.parametrize("normalizer", SOFTPICKS)
def test_row_weights_sum_to_at_most_one(normalizer, device):
    # a value of ones reads the row sum of the weights
    q, k, _, _ = draw(101, HQ=2, device=device)
    total = parallel_normalized_attn(q, k, torch.ones_like(k), normalizer=normalizer)
    assert (total <= 1 + 1e-6).all()
    assert (total >= 0).all()


def with_log_z(attn, inputs, dlse, normalizer, **kwargs):
    """Output, log of the denominator and the gradients of q, k and v; without a kernel by the formula."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    o = attn(q, k, v, normalizer=normalizer, **kwargs)
    if isinstance(o, tuple):
        o, lse = o
    else:
        f = FORMULAS[normalizer]
        s = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        d = (f.d(s) * (s.exp() - f.base)).tril(s.shape[-1] - s.shape[-2])
        lse = (d.sum(-1) + f.c).log()
    grads = torch.autograd.grad((o, lse), (q, k, v), (inputs.do, dlse))
    return dict(
        zip(("o", "lse", "dq", "dk", "dv"), (o.detach(), lse.detach(), *grads), strict=True)
    )


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@quick_normalizers("softpick")
def test_lse_and_its_gradient(normalizer, safe, device):
    inputs = draw(70, S=75, HQ=2, device=device)
    # scores that are mostly positive, so that no denominator is 0
    inputs = inputs._replace(q=inputs.q + 1, k=inputs.k + 1)
    dlse = draw(70, HQ=2, K=1, device=device).do[..., 0].transpose(1, 2)
    with poisoned_memory():
        got = with_log_z(
            parallel_normalized_attn, inputs, dlse, normalizer, safe=safe, return_lse=True
        )
    assert got["lse"].dtype == torch.float32
    assert got["lse"].shape == (1, 2, 70)
    eager = with_log_z(naive_normalized_attn, inputs, dlse, normalizer)
    gold = with_log_z(naive_normalized_attn, inputs.to(torch.float64), dlse.double(), normalizer)
    sizes = by_formula(inputs, normalizer).sizes
    for name, x in got.items():
        assert_no_worse_than_eager(name, x, eager[name], gold[name], sizes.get(name))


@quick_normalizers("softpick", "softmax")
def test_gradient_of_lse_alone(normalizer, device):
    q, k, v, _ = draw(9, device=device)
    q, k, v = (x.requires_grad_() for x in (q + 1, k + 1, v))
    _, lse = parallel_normalized_attn(q, k, v, normalizer=normalizer, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    inputs = Inputs(q, k, v, torch.zeros_like(v))
    gold = with_log_z(naive_normalized_attn, inputs, torch.ones_like(lse), normalizer)
    assert not dv.count_nonzero()
    for x, name in ((dq, "dq"), (dk, "dk")):
        assert_close(x, gold[name], rtol=1e-4, atol=1e-5)


def test_row_without_denominator(device):
    q, k, v, do = draw(65, HQ=2, device=device)
    inputs = Inputs(q.abs(), -k.abs(), v, do)
    _, lse = parallel_normalized_attn(*inputs[:3], normalizer="rectified", return_lse=True)
    assert (lse == -math.inf).all()
    got = run(inputs, normalizer="rectified")
    assert not any(x.count_nonzero() for x in got.values())


@pytest.mark.parametrize("attn", [parallel_normalized_attn, naive_normalized_attn])
def test_row_whose_denominator_underflows(attn, device):
    q, k, v, do = draw(65, device=device)
    inputs = Inputs(q.abs() * 1e3, -k.abs(), v, do)
    got = outputs_and_gradients(attn, inputs, normalizer="softmax", safe=False)
    assert not any(x.count_nonzero() for x in got.values())


def test_huge_negative_scores_give_no_nan(device):
    # published kernels: inf - inf once a row's scores all lie below -88
    inputs = draw(65, HQ=2, device=device)
    inputs = inputs._replace(q=inputs.q.abs() * 1e3, k=-inputs.k.abs())
    got = run(inputs, normalizer="softpick")
    assert not any(x.count_nonzero() for x in got.values())


def test_very_negative_first_tile_does_not_spoil_the_row(device):
    # published kernels: the running maximum of such a tile is far below 0
    T, first = 150, 128
    q, k, v, _ = draw(T, device=device)
    q, k = torch.ones_like(q), torch.full_like(k, 0.25)
    k[:, :first] = -100
    o = parallel_softpick_attn(q, k, v, scale=1.0)
    # score 4 for the later keys; each of the first adds 1 to the denominator
    n = math.exp(4) - 1
    for t in range(first, T):
        count = t - first + 1
        expected = n * v[:, first : t + 1].double().sum(1) / (first + count * n)
        assert_close(o[:, t].double(), expected, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("score", [1e-3, 1.0, 30.0, 1000.0])
def test_eps_is_that_of_the_reference_and_not_shifted(score, device):
    # published kernels: another eps than their reference, and added to the shifted denominator
    k = torch.tensor([score]).reshape(1, 1, 1, 1).to(device)
    o = parallel_softpick_attn(torch.ones_like(k), k, torch.ones_like(k), scale=1.0)
    n = math.expm1(min(score, 700.0))
    # at 1e-3 the two exponentials cancel to 1e-3 of their size
    assert_close(o.item(), n / (n + 1e-6), rtol=0.0, atol=5e-7)
    reference = naive_softpick_attn(torch.ones_like(k), k, torch.ones_like(k), scale=1.0)
    assert_close(o, reference, rtol=0.0, atol=5e-7)


@pytest.mark.parametrize("safe", with_slow([True, False], [True]))
@pytest.mark.parametrize("normalizer", SOFTPICKS)
def test_gradient_at_score_zero_is_zero(normalizer, safe, device):
    # published kernels: -1 times delta, where autograd says 0
    q, k, v, do = draw(70, device=device)
    k[:, ::3] = 0
    got = run(Inputs(q, k, v, do), normalizer=normalizer, safe=safe)
    assert not got["dk"][:, ::3].count_nonzero()
    assert got["dk"].count_nonzero()


@pytest.mark.gpu
@pytest.mark.parametrize("K", [64, 128], ids=["pointers", "descriptors"])
def test_offsets_beyond_32_bits(K, device):
    # published kernels: 32-bit offsets. The second head starts 2 ** 31 elements after the first.
    T = 300
    inputs = draw(T, K, HQ=2, head_first=True, dtype=torch.bfloat16, device=device)
    memory = torch.empty(2**31 + 4 * T * K, dtype=torch.bfloat16, device=device)
    far = []
    for i, x in enumerate(inputs):
        view = memory[i * T * K :].as_strided((1, 2, T, K), (0, 2**31, K, 1))
        far.append(view.copy_(x))
    kwargs = {"normalizer": "softpick", "head_first": True}
    assert_bitwise(
        outputs_and_gradients(parallel_normalized_attn, Inputs(*far), **kwargs),
        outputs_and_gradients(parallel_normalized_attn, inputs, **kwargs),
    )


@pytest.mark.gpu
def test_peak_memory(device, pytestconfig):
    # FlashAttention-2 keeps and allocates the same tensors, lse among them; ours may add one float32 per row and head
    B, T, HQ, K = 2, 4096, 16, 64
    inputs = draw(T, K, B=B, HQ=HQ, dtype=torch.bfloat16, device=device)

    def peak(attn):
        outputs_and_gradients(attn, inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs_and_gradients(attn, inputs)
        return torch.cuda.max_memory_allocated() - before

    def flash_attention_2(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            ).transpose(1, 2)

    ours = peak(lambda q, k, v: parallel_normalized_attn(q, k, v, normalizer="softpick"))
    allowed = 4 * B * T * HQ
    if pytestconfig.option.hopper:
        # a counter for each tile of 128 rows, and the one of the queue, in a block of the allocator
        allowed += 4 * B * T * HQ // 128 + 512
    assert ours <= peak(flash_attention_2) + allowed
