"""The operators under ``attn_implementation`` in models of transformers: padding, caches, generation, refusals."""

import inspect
import json

import pytest
import torch
from small_model import checkpoint_activations
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DataCollatorWithFlattening,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
    StaticCache,
)

import flame.models  # noqa: F401  # teaches transformers the operators
from flame.models import key_ranges

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, **GROUPED),
    "qwen3": Qwen3Config(**SHAPE, **GROUPED),
    "mistral, window": MistralConfig(**SHAPE, **GROUPED, sliding_window=6),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "gemma3, windows of some layers": Gemma3TextConfig(
        **SHAPE, **GROUPED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss, learned sinks": GptOssConfig(
        **SHAPE, **GROUPED, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
}
# what transformers calls the cache: another name before 5.24
CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def model_of(config, implementation="naive_softpick"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # large enough that attention decides
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=FAMILIES)
def model(request):
    return model_of(FAMILIES[request.param])


def prompts(lengths, side):
    """Token ids ``[B, T]``, their attention mask, and the rows without padding."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 97, (length,), generator=generator) for length in lengths]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, rows


def places(mask):
    """Positions of the tokens in their row."""
    return (mask.cumsum(1) - 1).clamp(min=0)


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
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    model.set_attn_implementation("softpick")
    for cache in "dynamic", "static":
        options = {"cache_implementation": cache, "disable_compile": True}
        steps.clear()
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), expected)
        # two layers, each token but the first
        assert steps[-14:] == [1] * 14
    steps.clear()
    one = model.generate(ids[:1], attention_mask=mask[:1], **GREEDY)
    assert torch.equal(one, expected[:1])
    assert steps == [1] * 14


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


def test_a_saved_model_is_loaded_with_its_operator_or_not_at_all(tmp_path, monkeypatch):
    model = model_of(FAMILIES["llama"])
    ids, _, _ = prompts([9], "left")
    expected = model(ids).logits
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert (
        json.loads((folder / "config.json").read_text())["attn_implementation"] == "naive_softpick"
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(loaded(ids).logits, expected)
    # once more, from what was loaded
    loaded.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(again(ids).logits, expected)
    on_purpose = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    assert not torch.allclose(on_purpose(ids).logits, expected, atol=0.1)
    on_purpose.save_pretrained(folder)
    assert "attn_implementation" not in json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    # a process that never imported flame.models
    monkeypatch.delitem(AttentionInterface._global_mapping, "naive_softpick")
    with pytest.raises(ValueError, match='attn_implementation="naive_softpick"` is not supported'):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_of_a_saved_model_keeps_its_operator(tmp_path):
    text = {**SHAPE, **GROUPED, "pad_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config={"hidden_size": 16})
    config._attn_implementation = {"": "sdpa", "text_config": "naive_softpick"}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded._attn_implementation == "sdpa"
    assert loaded.text_config._attn_implementation == "naive_softpick"
    assert loaded.vision_config._attn_implementation != "naive_softpick"


def test_merging_an_adapter_keeps_the_operator(tmp_path):
    peft = pytest.importorskip("peft")
    model = model_of(FAMILIES["llama"])
    ids, _, _ = prompts([9], "left")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    expected = adapted.eval()(ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_right_is_refused():
    model = model_of(FAMILIES["llama"])
    ids, mask, _ = prompts([8, 8], "left")
    holes = mask.clone()
    holes[0, 3] = 0
    with pytest.raises(NotImplementedError, match="zeros between ones"):
        model(ids, attention_mask=holes)
    with pytest.raises(NotImplementedError, match=r"not a mask of shape \(2, 1, 8, 8\)"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    mask[0, :2] = 0
    with pytest.raises(NotImplementedError, match="restart within a row, with padding or a cache"):
        model(ids, attention_mask=mask, position_ids=restart)
    past = model(ids).get(CACHE)
    with pytest.raises(NotImplementedError, match="restart within a row, with padding or a cache"):
        model(ids, position_ids=restart, **{CACHE: past})
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q and cu_seq_lens_k must be equal"):
        model(ids[:1], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds + 1)
    with pytest.raises(NotImplementedError, match="seq_idx without bounds: pass cu_seq_lens_q"):
        model(ids[:1], seq_idx=torch.zeros(1, 8, dtype=torch.int32))
    with pytest.raises(TypeError, match="naive_softpick_attn does not know the keyword 'kv_cache'"):
        model(ids, kv_cache=past)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"dropout, got 0.1"):
        model.train()(ids)
    with pytest.raises(ValueError, match="hardmax"):
        model_of(FAMILIES["llama"], "hardmax")


def test_a_model_that_would_ignore_the_operator_is_refused():
    shape = {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    message = "'naive_softpick' has no effect on BloomForCausalLM"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(BloomConfig(**shape), attn_implementation="naive_softpick")
    model = AutoModelForCausalLM.from_config(BloomConfig(**shape))
    with pytest.raises(ValueError, match=message):
        model.set_attn_implementation("naive_softpick")
