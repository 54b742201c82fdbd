"""Context parallelism: the attention of all processes together is the attention of one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numerics import with_slow
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AttentionInterface

from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM
from flame.models.attention import attention_forward
from flame.titan.context_parallel import (
    apply_context_parallel,
    attend_local_queries,
    local_rows,
    shard_batch,
)

LONG = 65536


def attention_and_gradients(forward, q, k, v, do):
    """``o`` ``[B, T, HQ, V]`` of ``forward(q, k, v)``, and the gradients of its arguments ``[B, H, T, D]``."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = forward(*leaves)
    o.backward(do)
    return [o.detach(), *(x.grad for x in leaves)]


def check_parts(
    name, *, T, size, window_size=None, device="cpu", dtype=torch.float32, D=16, B=2, H=2
):
    """Every process's part, put together, against one call; forward and backward."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (
        torch.randn(B, heads, T, D, device=device, generator=generator).to(dtype)
        for heads in (2 * H, H, H, 2 * H)
    )
    do = do.transpose(1, 2)
    attention = attention_forward(name)

    def whole(q, k, v):
        return attention(None, q, k, v, None, sliding_window=window_size)[0]

    def in_parts(q, k, v):
        parts = []
        for rank in range(size):
            rows = local_rows(q.transpose(1, 2), rank, size).transpose(1, 2)
            parts.append(
                attend_local_queries(
                    attention,
                    None,
                    rows,
                    k,
                    v,
                    None,
                    rank=rank,
                    size=size,
                    sliding_window=window_size,
                )
            )
        # where each process's rows came from
        places = torch.cat([local_rows(torch.arange(T)[None], r, size)[0] for r in range(size)])
        return torch.cat(parts, dim=1)[:, places.argsort().to(device)]

    return attention_and_gradients(whole, q, k, v, do), attention_and_gradients(
        in_parts, q, k, v, do
    )


@pytest.mark.parametrize("window_size", [None, 1, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_of_the_reference_are_the_whole(size, window_size):
    expected, got = check_parts(
        "naive_softpick_attn", T=24, size=size, window_size=window_size, dtype=torch.float64
    )
    for name, x, y in zip(("o", "dq", "dk", "dv"), expected, got, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window_size", [None, 7])
@pytest.mark.parametrize("normalizer", with_slow(["softpick", "softmax"], ["softpick"]))
def test_parts_of_the_kernel_are_the_whole(device, normalizer, window_size):
    name = f"parallel_{normalizer}_attn"
    expected, got = check_parts(
        name, T=48, size=2, window_size=window_size, device=device, B=1, H=1
    )
    for name, x, y in zip(("o", "dq", "dk", "dv"), expected, got, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu
def test_parts_of_the_kernel_are_the_whole_at_64k_tokens(device):
    name = "parallel_softpick_attn"
    expected, got = check_parts(name, T=LONG, size=2, device=device, D=64)
    for name, x, y in zip(("o", "dq", "dk", "dv"), expected, got, strict=True):
        # sums over 64k terms, whose order differs
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_every_process_has_as_many_keys_to_see():
    T, size = 64, 4
    seen = [local_rows(torch.arange(T)[None] + 1, rank, size).sum() for rank in range(size)]
    assert len({x.item() for x in seen}) == 1
    assert sum(seen) == T * (T + 1) / 2


# places whose rows are computed at 64k: both ends of every process's chunks, and some between
SAMPLE = sorted(
    {0, 1, LONG - 1}
    | {i * LONG // 4 + d for i in (1, 2, 3) for d in (-1, 0)}
    | set(torch.randint(LONG, (25,), generator=torch.Generator().manual_seed(0)).tolist())
)


def sampled_attention(module, query, key, value, mask, *, scaling, **kwargs):
    """The reference at the places in `SAMPLE` alone, 0 elsewhere: 64k rows of 64k scores take 32 GB."""
    T, S = query.shape[2], key.shape[2]
    attention = attention_forward("naive_softpick_attn")
    o = query.new_zeros(query.shape[0], T, query.shape[1], value.shape[-1])
    for place in SAMPLE:
        if S - T <= place < S:
            end, row = place + 1, place - (S - T)
            rows = query[:, :, row : row + 1], key[:, :, :end], value[:, :, :end]
            o[:, row : row + 1] = attention(module, *rows, mask, scaling)[0]
    return o, None


def attention_layer(mesh=None):
    """Output and gradients of a Llama attention layer at 64k tokens, of this process's rows."""
    config = SoftpickTransformerConfig(
        attn_impl="naive_softpick_attn",
        vocab_size=8,
        hidden_size=32,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LONG,
    )
    torch.manual_seed(0)
    name = "naive_softpick_attn"
    model = SoftpickTransformerForCausalLM(config).double()
    AttentionInterface.register(name, sampled_attention)
    if mesh is not None:
        apply_context_parallel(model, mesh)
    layer: nn.Module = model.model.layers[0].self_attn
    x = torch.randn(1, LONG, 32, dtype=torch.float64)
    do = torch.randn(1, LONG, 32, dtype=torch.float64)
    places = torch.arange(LONG)[None]
    if mesh is not None:
        rank, size = mesh.get_local_rank(), mesh.size()
        x, do, places = (local_rows(y, rank, size) for y in (x, do, places))
        batch, labels = shard_batch(
            {"input": torch.arange(LONG)[None]}, torch.arange(LONG)[None], mesh
        )
        assert torch.equal(batch["positions"], places)
        assert torch.equal(batch["input"], places)
        assert torch.equal(labels, places)
    x.requires_grad_()
    o, _ = layer(x, position_embeddings=model.model.rotary_emb(x, places))
    AttentionInterface.register(name, attention_forward(name))
    o.backward(do)
    weights = {name: p.grad for name, p in layer.named_parameters()}
    return {"places": places[0], "o": o.detach()[0], "dx": x.grad[0]}, weights


def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    rows, weights = attention_layer(init_device_mesh("cpu", (2,)))
    for gradient in weights.values():
        dist.all_reduce(gradient)
    torch.save((rows, weights), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_at_64k_tokens(tmp_path):
    whole, weights = attention_layer()
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    places = []
    for rank in range(2):
        rows, got = torch.load(tmp_path / f"{rank}.pt")
        places.append(rows["places"])
        for name in ("o", "dx"):
            expected = whole[name][rows["places"]]
            torch.testing.assert_close(rows[name], expected, rtol=1e-10, atol=1e-12)
        for name, gradient in weights.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)
    # every row is held once, and the sampled ones are not 0
    assert torch.equal(torch.cat(places).sort().values, torch.arange(LONG))
    assert (whole["o"][SAMPLE[1:]].abs().amax(-1) > 0).all()
