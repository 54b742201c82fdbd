"""Models of transformers that are saved with their operator, and what is refused."""

import json

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
)
from transformers_families import CACHE, FAMILIES, GROUPED, SHAPE, model_of, prompts

import flame.models  # noqa: F401  # teaches transformers the operators


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
