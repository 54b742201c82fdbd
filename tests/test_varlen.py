"""Packed documents through the model: the logits of each are those of the document alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from flame.data.batches import Rows, to_batch
from flame.models import read_config
from flame.titan.model import ModelArgs, TitanModel

CONFIGS = Path(__file__).parent.parent / "configs"
OPERATORS = ["naive_softpick_attn", "naive_softmax_attn", "parallel_softpick_attn"]


def model_of(attn_impl, device, layers=2):
    config = read_config(CONFIGS / "softpick_transformer_tiny.json")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "head_dim": 16,
    }
    for name, value in {**shape, "num_attention_heads": 2, "num_key_value_heads": 1}.items():
        setattr(config, name, value)
    config.attn_impl = attn_impl
    torch.manual_seed(0)
    model = TitanModel(ModelArgs(config, seed=0))
    for parameter in model.parameters():
        # large enough that attention matters
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def packed_batch(T, ends, context_len, device):
    """A batch of one row for each list of ends, as the loaders make it."""
    tokens = np.random.default_rng(0).integers(0, 256, (len(ends), T + 1)).astype(np.uint16)
    inputs, labels = to_batch(Rows(tokens, [np.array(own, int) for own in ends]), context_len)
    return {name: x.to(device) for name, x in inputs.items()}, labels.to(device)


@pytest.mark.parametrize("attn_impl", OPERATORS)
def test_packed_is_separate(attn_impl, device):
    # one layer is slow enough in Triton's interpreter
    model = model_of(attn_impl, device, layers=1 if attn_impl.startswith("parallel") else 2)
    # documents that end within a row, at its first token, at its end; pieces cut after 10
    inputs, labels = packed_batch(24, [[5], [1, 24]], 10, device)
    ids, bounds = inputs["input"].flatten(), inputs["cu_seqlens"].tolist()
    assert bounds == [0, 5, 15, 24, 25, 35, 45, 48]

    def loss_of(logits, labels):
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )

    logits = model(inputs.pop("input"), **inputs)
    assert logits.shape == (2, 24, 259)
    loss_of(logits, labels).backward()
    packed = {name: x.grad for name, x in model.named_parameters()}
    model.zero_grad()
    separate = [
        model(ids[None, first:last]) for first, last in zip(bounds, bounds[1:], strict=False)
    ]
    separate = torch.cat(separate, 1)
    torch.testing.assert_close(logits.view_as(separate), separate, rtol=2e-4, atol=2e-4)
    loss_of(separate, labels.view(1, -1)).backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(packed[name], x.grad, rtol=1e-3, atol=1e-3, msg=name)
    # and it is not what plain causal attention gives
    plain = model(ids.view(2, 24))
    assert (plain[0, :5] - logits[0, :5]).abs().max() < 2e-4
    assert (plain[0, 5:] - logits[0, 5:]).abs().amax(-1).min() > 1e-2


def test_positions_reach_the_rotation(device):
    model = model_of("naive_softpick_attn", device)
    seen = []
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    inputs, _ = packed_batch(24, [[5], [1, 24]], 10, device)
    model(inputs["input"], inputs["positions"], inputs["cu_seqlens"])
    expected = [i for length in (5, 10, 9, 1, 10, 10, 3) for i in range(length)]
    assert seen[0].tolist() == [expected]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_compilation_for_another_number_of_documents(device):
    model = model_of("parallel_softpick_attn", device)
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    for ends in ([5], [], [1, 2, 3, 4, 5, 6, 7]):
        inputs, _ = packed_batch(32, [ends], 32, device)
        with torch.no_grad():
            model(inputs.pop("input"), **inputs)
    torch._dynamo.reset()
    # the layers share their code
    assert len(compiled) == 1


def test_queries_and_keys_packed_apart_are_refused():
    attention = AttentionInterface()["naive_softpick_attn"]
    q, bounds = torch.zeros(1, 2, 4, 16), torch.tensor([0, 4])
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q and cu_seq_lens_k"):
        attention(torch.nn.Module(), q, q, q, None, cu_seq_lens_q=bounds)
