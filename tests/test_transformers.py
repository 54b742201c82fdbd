"""The operators under ``attn_implementation`` in models of transformers: padding, packing, gradients, weights."""

import pytest
import torch
from small_model import checkpoint_activations
from transformers import (
    DataCollatorWithFlattening,
)
from transformers_families import FAMILIES, model_of, places, prompts

import flame.models  # noqa: F401  # teaches transformers the operators


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(FAMILIES[request.param])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(model, side):
    ids, mask, rows = prompts([11, 4, 9, 1], side)
    logits = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    assert logits.isfinite().all()
    for row, own, present in zip(rows, logits, mask.bool(), strict=True):
        torch.testing.assert_close(own[present], model(row[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_gradients_of_the_rows_alone(side):
    model = model_of(FAMILIES["llama"])
    ids, mask, rows = prompts([7, 3], side)
    logits = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    (logits.square().sum(-1) * mask).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in rows:
        model(row[None]).logits.square().sum().backward()
    for p, gradient in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_changes_nothing():
    model = model_of(FAMILIES["llama"]).train()
    ids, mask, _ = prompts([7, 3], "right")
    gradients = []
    for is_on in False, True:
        if is_on:
            checkpoint_activations(model)
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def collated(lengths, **options):
    """A batch of `DataCollatorWithFlattening` without labels, and the documents alone."""
    ids, _, rows = prompts(lengths, "left")
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
    del batch["labels"]
    return batch, [row[None] for row in rows]


def test_packed_documents_are_the_documents_alone(model):
    batch, documents = collated((5, 3, 6))
    expected = torch.cat([model(x).logits for x in documents], 1)
    bounded, _ = collated((5, 3, 6), return_flash_attn_kwargs=True)
    # equal, but not one tensor
    assert bounded["cu_seq_lens_q"] is not bounded["cu_seq_lens_k"]
    for packed in batch, bounded:
        for cache in {}, {"use_cache": False}:
            logits = model(**packed, **cache).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_row_of_a_batch_holds_documents_of_its_own():
    model = model_of(FAMILIES["llama"])
    (first, a), (second, b) = collated((5, 3, 6)), collated((9, 5))
    ids, positions = (torch.cat([first[key], second[key]]) for key in ("input_ids", "position_ids"))
    got = model(ids, position_ids=positions, output_attentions=True)
    for i, documents in enumerate((a, b)):
        alone = [model(x, output_attentions=True) for x in documents]
        logits = torch.cat([x.logits for x in alone], 1)
        torch.testing.assert_close(got.logits[i], logits[0], rtol=1e-4, atol=1e-4)
        for layer, weights in enumerate(got.attentions):
            own = [x.attentions[layer][0].unbind() for x in alone]
            blocks = torch.stack([torch.block_diag(*heads) for heads in zip(*own, strict=True)])
            torch.testing.assert_close(weights[i], blocks, rtol=1e-4, atol=1e-5)
    # positions written to anew are looked at anew
    positions.copy_(torch.arange(14))
    plain = model(ids).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, plain)


@pytest.mark.slow
def test_a_training_step_compiles_into_one_graph():
    model = model_of(FAMILIES["llama"]).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, _, _ = prompts([9, 9], "left")
    gradients = []
    for f in model, compiled:
        model.zero_grad()
        f(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    # a graph cannot look at positions when it is made, and does when it runs
    with pytest.raises(RuntimeError, match="positions that restart"):
        compiled(ids, position_ids=torch.arange(9).remainder(4)[None], use_cache=False)


def test_weights_are_returned_on_request(model):
    ids, mask, _ = prompts([9, 5], "left")
    options = {"attention_mask": mask, "position_ids": places(mask)}
    for layer in model(ids, output_attentions=True, **options).attentions:
        assert layer.shape == (2, 4, 9, 9)
        # softpick: rows sum to at most 1, and padding has and gets none
        assert layer.sum(-1).max() <= 1 + 1e-5
        assert layer.sum() > 0
        assert not layer[1, :, :4].any()
        assert not layer[1, :, :, :4].any()
    model.set_attn_implementation("naive_softmax")
    ours = model(ids, output_attentions=True, **options).attentions
    model.set_attn_implementation("eager")
    theirs = model(ids, output_attentions=True, **options).attentions
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(a[1, :, 4:], b[1, :, 4:], rtol=1e-3, atol=1e-3)


def test_softmax_under_its_own_name_is_transformers_own(model):
    ids, mask, _ = prompts([9, 5], "left")
    options = {"attention_mask": mask, "position_ids": places(mask)}
    model.set_attn_implementation("naive_softmax")
    ours = model(ids, **options).logits
    # gpt-oss, whose sinks torch's own attention does not have, is eager in transformers
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    theirs = model(ids, **options).logits
    present = mask.bool()
    torch.testing.assert_close(ours[present], theirs[present], rtol=1e-3, atol=1e-3)
