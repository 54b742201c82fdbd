"""Times the Triton operators beside torch's own softmax attention: python benchmarks/bench_attn.py

bfloat16, causal, random normal inputs, medians of `triton.testing.do_bench` in one process. TFLOP/s count
the products below the diagonal only, 4 B H T T D / 2 forward and 2.5 times that backward, so figures of
different operators compare by time. An operator is checked against float64 before it is timed.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from fla.ops.attn.softpick import (
    naive_softmax_attn,
    naive_softpick_attn,
    parallel_softmax_attn,
    parallel_softpick_attn,
)

# batch, heads, time, head dimension
SHAPES = [(4, 32, 4096, 64), (2, 16, 8192, 128), (16, 32, 1024, 64), (8, 16, 2048, 128)]
# largest relative L2 error of an output or a gradient in bfloat16
MAX_ERROR = 1e-2

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # [B, T, H, D] -> [B, H, T, D] without a copy, as a model would
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


OPERATORS: dict[str, tuple[Attention, Attention]] = {
    "softpick": (parallel_softpick_attn, naive_softpick_attn),
    "softpick, safe=False": (
        lambda q, k, v: parallel_softpick_attn(q, k, v, safe=False),
        naive_softpick_attn,
    ),
    "softmax, same kernel": (parallel_softmax_attn, naive_softmax_attn),
    "softmax, cuDNN": (sdpa(SDPBackend.CUDNN_ATTENTION), naive_softmax_attn),
    "softmax, FA2": (sdpa(SDPBackend.FLASH_ATTENTION), naive_softmax_attn),
}


def forward_and_gradients(f: Attention, inputs: list[torch.Tensor], do: torch.Tensor):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = f(*inputs)
    return o, *torch.autograd.grad(o, inputs, do.to(o.dtype))


def check(f: Attention, reference: Attention, D: int) -> None:
    """Raises unless f agrees with the reference in float64 on fresh random inputs."""
    q, k, v, do = (torch.randn(2, 500, 2, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    got = forward_and_gradients(f, [q, k, v], do)
    gold = forward_and_gradients(reference, [q.double(), k.double(), v.double()], do)
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, gold, strict=True):
        error = ((x.double() - y).norm() / y.norm()).item()
        if not error <= MAX_ERROR:
            raise RuntimeError(f"{name} is wrong, relative error {error:.1e}: not timed")


def measure(f: Attention, shape: tuple[int, int, int, int]) -> str:
    B, H, T, D = shape
    q, k, v = (
        torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    forward_ms = do_bench(lambda: f(q, k, v), return_mode="median")
    o = f(q, k, v)
    do = torch.randn_like(o)
    backward_ms = do_bench(
        lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), return_mode="median"
    )
    gflop = 2 * B * H * T * T * D / 1e9
    return (
        f"{forward_ms:8.3f} ms {gflop / forward_ms:5.0f} TFLOP/s   "
        f"{backward_ms:8.3f} ms {2.5 * gflop / backward_ms:5.0f} TFLOP/s"
    )


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench_attn.py needs a GPU")
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"commit {commit or 'unknown'}"
    )
    print(f"{'B, H, T, D':20} {'operator':22} {'forward':>27}   {'backward':>27}")
    for shape in SHAPES:
        for name, (f, reference) in OPERATORS.items():
            try:
                check(f, reference, shape[-1])
                result = measure(f, shape)
            except RuntimeError as error:
                # a backend that this build of torch or this card does not have, or a failed check
                result = str(error).splitlines()[0]
            print(f"{', '.join(map(str, shape)):20} {name:22} {result}", flush=True)


if __name__ == "__main__":
    main()
