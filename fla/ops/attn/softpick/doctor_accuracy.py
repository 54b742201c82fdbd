"""Compares the kernels with float64, for `doctor.py`, by the rule that the tests of this repository use.

A kernel may err at most twice as much as the reference in PyTorch in the same dtype, plus one rounding, in the
largest element and in the worst row. In float32 on a GPU it is four times, since the hardware's exp2 errs by two units
in the last place.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fla.ops.attn.softpick.decoding import normalized_attn_decode
from fla.ops.attn.softpick.kernel_choice import hopper_refusal_of_kind, hopper_serving
from fla.ops.attn.softpick.launch_shapes import architecture
from fla.ops.attn.softpick.naive import naive_normalized_attn, visible_keys
from fla.ops.attn.softpick.naive_decoding import naive_normalized_attn_decode
from fla.ops.attn.softpick.parallel import IS_INTERPRETED, parallel_normalized_attn

if TYPE_CHECKING:
    from fla.ops.attn.softpick.doctor import Report

KERNELS = {"fwd": ("o",), "dq": ("dq",), "dkv": ("dk", "dv")}


class Case(NamedTuple):
    """Inputs of one comparison.

    `queries` is the number of query tokens of decoding, 0 for attention. `is_hopper`: by the kernels for Hopper.
    """

    dtype: torch.dtype
    D: int
    options: str
    T: int
    HQ: int = 4
    H: int = 4
    normalizer: str = "softpick"
    window: int | None = None
    is_packed: bool = False
    queries: int = 0
    is_hopper: bool = False

    @property
    def label(self) -> str:
        """First columns of the line of this case."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name:9} {self.D:4} {self.normalizer:9} {self.options:28}"


def cases(is_quick: bool) -> list[Case]:
    """The dtypes, head dimensions and options that are compared, the most used first."""
    if is_quick:
        # the interpreter's products of bfloat16 are wrong (docs/softpick/KERNELS.md, section 7)
        dtype = torch.float32 if IS_INTERPRETED else torch.bfloat16
        both = {"H": 2, "window": 9, "is_packed": True}
        return [
            Case(dtype, 13, "packed, window, GQA", 40, **both),
            Case(dtype, 16, "decode, GQA", 40, H=2, queries=1),
        ]
    T = 300
    alone: dict[str, dict[str, Any]] = {
        "window": {"window": 70},
        "packed": {"is_packed": True},
        "GQA": {"H": 2},
    }
    together: dict[str, Any] = {"H": 1, "window": 70, "is_packed": True}
    chosen = []
    has_hopper = architecture(0) == "sm_90"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        of_dtype = []
        for D in (64, 128, 61):
            of_dtype += [
                Case(dtype, D, "causal", T),
                Case(dtype, D, "packed, window, GQA", T, **together),
                Case(dtype, D, "decode, 1 row", 1000, queries=1),
                Case(dtype, D, "decode, 40 rows, GQA, window", 1000, H=1, window=300, queries=10),
            ]
            if dtype == torch.bfloat16:
                of_dtype += [Case(dtype, D, name, T, **options) for name, options in alone.items()]
                of_dtype.append(Case(dtype, D, "causal", T, normalizer="softmax"))
        chosen += of_dtype
        if has_hopper:
            chosen += [
                case._replace(is_hopper=True, options=f"{case.options}, Gluon")
                for case in of_dtype
                if not case.queries
                and hopper_refusal_of_kind("dkv", "sm_90", dtype, case.D, case.D) is None
            ]
    return chosen


def worst_row(error: torch.Tensor, size: torch.Tensor) -> float:
    """Largest L2 error of a row relative to its size, or to 1e-3 of the largest row."""
    norms = size.norm(dim=-1)
    floor = max(1e-3 * norms.max().item(), torch.finfo(size.dtype).tiny)
    return (error.norm(dim=-1) / norms.clamp(min=floor)).max().item()


def share_of_allowed(
    got: torch.Tensor, eager: torch.Tensor, gold: torch.Tensor, size: torch.Tensor
) -> float:
    """Error of a result over what the rule allows; above 1, or NaN, breaks it.

    Args:
        got: Result of a kernel.
        eager: The reference in the same dtype.
        gold: The reference in float64 on the same inputs.
        size: Size of the terms that add up to ``gold``, which may cancel.
    """
    factor = 4.0 if got.is_cuda and got.dtype == torch.float32 else 2.0
    eps = torch.finfo(got.dtype).eps
    size = torch.maximum(size, gold.abs())
    error, error_eager = (got.double() - gold).abs(), (eager.double() - gold).abs()
    largest = error.max() / (factor * error_eager.max() + eps * size.max())
    row = worst_row(error, size) / (factor * worst_row(error_eager, size) + eps)
    # max() of Python would lose a NaN
    return torch.stack([largest, largest.new_tensor(row)]).max().item()


def draw(case: Case) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v, and the gradient of the output: standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(case.T)
    B = 1 if case.is_packed else 2
    T = case.queries or case.T
    shapes = (B, T, case.HQ), (B, case.T, case.H), (B, case.T, case.H), (B, T, case.HQ)
    device = "cpu" if IS_INTERPRETED else "cuda"
    *inputs, do = (
        torch.randn(*shape, case.D, generator=generator).to(device, case.dtype) for shape in shapes
    )
    return inputs, do


def outputs(
    operator: Any, inputs: list[torch.Tensor], do: torch.Tensor, kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The output of attention and its gradients by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = operator(*leaves, **kwargs)
    gradients = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return {"o": o.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def sizes_of_terms(
    inputs: list[torch.Tensor], do: torch.Tensor, kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Root of the sum of squares of the terms that each result is the sum of, in float64.

    The terms may cancel, as where a query sees one key, and their roundings remain. What float32 rounds inside the
    kernels (exponents, sums over features) counts in roundings of the inputs' dtype.
    """
    eps = torch.finfo(do.dtype).eps
    inside = min(torch.finfo(torch.float32).eps / eps, 1.0)
    q, k, v = (x.double() for x in inputs)
    o, lse = naive_normalized_attn(q, k, v, **kwargs, return_lse=True)
    G, D = q.shape[2] // k.shape[2], q.shape[3]
    q, k, v, o, do = (x.double().transpose(1, 2) for x in (q, k, v, o, do))
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scale = D**-0.5
    s = q @ k.mT * scale
    lse = lse[..., None]
    visible = visible_keys(
        q.shape[2], k.shape[2], q.device, kwargs.get("cu_seqlens"), kwargs["window_size"]
    )
    # of the normalisers that are compared, softpick has a base and gives negative scores no weight
    is_softpick = kwargs["normalizer"] == "softpick"
    has_weight = s > 0 if is_softpick else torch.ones_like(s, dtype=torch.bool)
    amplified = 1 + inside * (s.abs() + lse.abs())
    minus = torch.where(visible, (s - lse).exp(), 0.0) * amplified
    plus = torch.where(has_weight, minus, 0.0)
    weights = (
        plus + torch.where(visible & has_weight, (-lse).exp() * amplified * is_softpick, 0.0)
    ) * (1 + inside)
    o_square = weights**2 @ v**2
    summed = 1 + inside * D**0.5
    dp_square = do**2 @ v.mT**2 * summed**2
    delta_square = (do**2 * (o**2 + o_square)).sum(-1, keepdim=True) * summed**2
    plus_square = plus**2 * dp_square
    # where softpick divides by less than 1, its terms cancel in float32, and only what is left is rounded
    is_small = (lse < -0.01) & is_softpick
    e = torch.where(visible, (s - lse).exp(), 0.0)
    ds = e * (has_weight * (do @ v.mT) - s.sign() * (do * o).sum(-1, keepdim=True))
    plus_square = torch.where(is_small, inside**2 * plus_square + ds**2, plus_square)
    delta_small = inside**2 * (weights**2 * dp_square).sum(-1, keepdim=True)
    delta_square = torch.where(is_small, delta_small, delta_square)
    ds_square = (plus_square + minus**2 * delta_square) * scale**2
    # delta is one number for all keys of a row, so its rounding adds up along a row of dq
    dq_square = ds_square @ k**2 + (minus @ k * scale) ** 2 * delta_square
    squares = {
        "o": o_square,
        "dq": dq_square,
        "dk": (ds_square.mT @ q**2).unflatten(1, (-1, G)).sum(2),
        "dv": (weights.mT**2 @ do**2).unflatten(1, (-1, G)).sum(2),
    }
    return {name: x.sqrt().transpose(1, 2) for name, x in squares.items()}


def compare_attention(case: Case) -> dict[str, float]:
    """Share of the allowed error by kernel."""
    inputs, do = draw(case)
    kwargs: dict[str, Any] = {"normalizer": case.normalizer, "window_size": case.window}
    if case.is_packed:
        # a single token, an empty sequence, two long ones
        bounds = [0, 1, case.T // 2, case.T // 2, case.T]
        kwargs["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=do.device)
    with hopper_serving("all" if case.is_hopper else "none"):
        got = outputs(parallel_normalized_attn, inputs, do, kwargs)
    eager = outputs(naive_normalized_attn, inputs, do, kwargs)
    gold = outputs(naive_normalized_attn, [x.double() for x in inputs], do, kwargs)
    sizes = sizes_of_terms(inputs, do, kwargs)
    shares = {x: share_of_allowed(got[x], eager[x], gold[x], sizes[x]) for x in got}
    return {
        kernel: torch.tensor([shares[name] for name in names]).max().item()
        for kernel, names in KERNELS.items()
    }


def compare_decoding(case: Case) -> dict[str, float]:
    """Share of the allowed error of decoding."""
    inputs, do = draw(case)
    lengths = torch.tensor([case.T, case.T * 2 // 3], dtype=torch.int32, device=do.device)
    kwargs: dict[str, Any] = {"normalizer": case.normalizer, "window_size": case.window}
    q, k, v = inputs
    got = normalized_attn_decode(q, k, v, lengths, **kwargs)
    eager = naive_normalized_attn_decode(q, k, v, lengths, **kwargs)
    gold = naive_normalized_attn_decode(q.double(), k.double(), v.double(), lengths, **kwargs)
    return {"decode": share_of_allowed(got, eager, gold, gold.abs())}  # pyright: ignore[reportArgumentType]  # without return_lse the result is one tensor


def check_kernels(report: "Report", is_quick: bool) -> None:
    """Prints a line for each case."""
    report.begin(
        "correctness",
        "Correctness: error over the allowed error, by kernel (above 1 fails). Allowed is twice the error of\n"
        "PyTorch in the same dtype, four times in float32 on a GPU, plus one rounding. float64 is the truth.",
    )
    if IS_INTERPRETED:
        report.line("float32 alone, since Triton's interpreter multiplies bfloat16 wrongly")
    report.line(f"{'dtype':9} {'D':>4} {'':9} {'options':28}")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for case in cases(is_quick):
            compare = compare_decoding if case.queries else compare_attention
            shares = report.attempt(case.label, lambda f=compare, case=case: f(case))
            if shares is None:
                continue
            cells = "  ".join(f"{name} {x:.2f}" for name, x in shares.items())
            wrong = [name for name, x in shares.items() if not x <= 1]
            if wrong:
                report.fail(case.label, f"{', '.join(wrong)} too far from float64: {cells}")
            else:
                report.line(f"{case.label}  {cells}")
    finally:
        torch.set_float32_matmul_precision(precision)
