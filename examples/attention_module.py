"""The operator in a module of your own: causal self-attention with grouped query heads.

    python examples/attention_module.py                       # the reference, on a CPU
    python examples/attention_module.py --operator triton     # the kernels, on a GPU

Both operators compute the same function. Which one runs is your choice: the kernels refuse a tensor on a CPU, and no
operator replaces another one in silence.
"""

import argparse

import torch
from torch import nn

from fla.ops.attn import parallel_softpick_attn
from fla.ops.attn.softpick import naive_softpick_attn

OPERATORS = {"naive": naive_softpick_attn, "triton": parallel_softpick_attn}


class SelfAttention(nn.Module):
    """``x [B, T, hidden]`` to ``[B, T, hidden]``."""

    def __init__(self, hidden: int, num_heads: int, num_key_heads: int, operator: str) -> None:
        super().__init__()
        self.head_dim = hidden // num_heads
        self.attn = OPERATORS[operator]
        self.q_proj = nn.Linear(hidden, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, num_key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, num_key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # [B, T, heads, head_dim]: no transpose, the operators take this layout
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attn(q, k, v).flatten(-2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Softpick attention in a module of your own.")
    parser.add_argument("--operator", choices=OPERATORS, default="naive")
    operator = parser.parse_args().operator
    device = "cuda" if operator == "triton" else "cpu"

    torch.manual_seed(0)
    attention = SelfAttention(hidden=64, num_heads=4, num_key_heads=2, operator=operator).to(device)
    x = torch.randn(2, 100, 64, device=device)
    y = attention(x)
    y.square().mean().backward()
    print(f"{operator} on {device}: {tuple(x.shape)} -> {tuple(y.shape)}")
    print(f"gradient of q_proj: norm {attention.q_proj.weight.grad.norm():.2e}")


if __name__ == "__main__":
    main()
