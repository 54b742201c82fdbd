"""Generation of transformers with the operators: caches, beams, compiled steps, layers on several devices."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    StaticCache,
)
from transformers_families import CACHE, FAMILIES, model_of, places, prompts

import flame.models  # noqa: F401  # teaches transformers the operators
from flame.models import key_ranges

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(FAMILIES[request.param])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_batched_generation_is_one_by_one(model, cache):
    ids, mask, rows = prompts([9, 3, 6], "left")
    kind = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    batch = model.generate(ids, attention_mask=mask, disable_compile=True, **kind, **GREEDY)
    for row, written in zip(rows, batch, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **GREEDY)
        assert torch.equal(written[-8:], alone[0, -8:])


def test_triton_generates_what_the_reference_does(device, monkeypatch):
    steps, decode = [], key_ranges.normalized_attn_decode

    def spy(q, *args, **kwargs):
        steps.append(q.shape[1])
        return decode(q, *args, **kwargs)

    monkeypatch.setattr(key_ranges, "normalized_attn_decode", spy)
    ids, mask, _ = (
        x.to(device) if isinstance(x, torch.Tensor) else x for x in prompts([9, 3], "left")
    )
    model = model_of(FAMILIES["mistral, window"]).to(device)
    greedy = GREEDY | {"max_new_tokens": 5}
    expected = model.generate(ids, attention_mask=mask, **greedy)
    model.set_attn_implementation("softpick")
    for cache in "dynamic", "static":
        options = {"cache_implementation": cache, "disable_compile": True}
        steps.clear()
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **greedy), expected)
        # two layers, each token but the first
        assert steps[-8:] == [1] * 8
    steps.clear()
    one = model.generate(ids[:1], attention_mask=mask[:1], **greedy)
    assert torch.equal(one, expected[:1])
    assert steps == [1] * 8


@pytest.mark.slow
def test_decoding_from_a_static_cache_compiles_into_one_graph(device):
    model = model_of(FAMILIES["llama"], "softpick").to(device)
    ids, mask, _ = (
        x.to(device) if isinstance(x, torch.Tensor) else x for x in prompts([9, 4], "left")
    )
    expected = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for end, step in ((6, model), (7, compiled), (8, compiled), (9, compiled)):
            start = end - 1 if end > 6 else 0
            logits = step(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=places(mask)[:, start:end],
                **{CACHE: cache},
            ).logits
            torch.testing.assert_close(logits[:, -1], expected[:, end - 1], rtol=1e-4, atol=1e-4)


def test_beams_and_sampling_with_and_without_cache():
    model = model_of(FAMILIES["llama"])
    ids, mask, _ = prompts([7, 4], "left")
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        written = []
        for use_cache in True, False:
            torch.manual_seed(1)
            written.append(
                model.generate(
                    ids, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **options
                )
            )
        assert torch.equal(*written)


def test_chunked_prefill_of_padded_rows_is_prefill():
    model = model_of(FAMILIES["llama"])
    ids, mask, _ = prompts([12, 5], "left")
    whole = model(ids, attention_mask=mask, position_ids=places(mask)).logits
    first = model(
        ids[:, :8], attention_mask=mask[:, :8], position_ids=places(mask)[:, :8], use_cache=True
    )
    rest = model(
        ids[:, 8:],
        attention_mask=mask,
        position_ids=places(mask)[:, 8:],
        **{CACHE: first.get(CACHE)},
    )
    torch.testing.assert_close(rest.logits, whole[:, 8:], rtol=1e-4, atol=1e-4)


def test_layers_spread_by_a_device_map_compute_the_same(tmp_path):
    model = model_of(FAMILIES["llama"])
    model.save_pretrained(tmp_path / "model")
    # places that every machine has; a layer on disk is brought in for its turn by accelerate's hooks
    places_of = {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"}
    places_of |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        attn_implementation="naive_softpick",
        device_map=places_of,
        offload_folder=tmp_path / "offload",
    ).eval()
    assert next(spread.model.layers[0].parameters()).is_meta
    ids, mask, _ = prompts([9, 5], "left")
    options = {"attention_mask": mask, "position_ids": places(mask)}
    torch.testing.assert_close(spread(ids, **options).logits, model(ids, **options).logits)
    both = [m.generate(ids, attention_mask=mask, **GREEDY) for m in (spread, model)]
    assert torch.equal(*both)
