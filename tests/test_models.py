"""softpick_transformer: shipped configurations, saving and loading, what transformers may not do to it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flame.base.errors import UsageError
from flame.models import OPERATORS, normalizer_of, read_config, require_device
from flame.titan.model import ModelArgs, TitanModel

CONFIGS = Path(__file__).parent.parent / "configs"
MILLIONS = {"tiny": 0.858, "35M": 33.694, "120M": 119.947, "340M": 373.868, "1B": 1775.372}


def small(**changes):
    config = read_config(CONFIGS / "softpick_transformer_tiny.json")
    for name, value in {"num_hidden_layers": 2, **changes}.items():
        setattr(config, name, value)
    return config


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


TOKENS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("size", MILLIONS)
@pytest.mark.parametrize("arm", ["softpick", "softmax"])
def test_shipped_config_builds_on_meta(arm, size):
    config = read_config(CONFIGS / f"{arm}_transformer_{size}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(model.num_parameters() / 1e6, 3) == MILLIONS[size]
    assert normalizer_of(config.attn_impl) == arm


@pytest.mark.parametrize("size", MILLIONS)
def test_arms_differ_in_the_operator_alone(size):
    softpick, softmax = (
        json.loads((CONFIGS / f"{arm}_transformer_{size}.json").read_text())
        for arm in ("softpick", "softmax")
    )
    assert softpick.pop("attn_impl").replace("softpick", "softmax") == softmax.pop("attn_impl")
    assert softpick == softmax


def test_shapes_of_the_paper():
    # arXiv:2504.20966: hidden, heads, layers; the 1.8B model is called 1B
    for size, shape in {"340M": (1024, 16, 24), "1B": (2048, 32, 32)}.items():
        c = read_config(CONFIGS / f"softpick_transformer_{size}.json")
        assert (c.hidden_size, c.num_attention_heads, c.num_hidden_layers) == shape
        assert (c.head_dim, c.vocab_size, c.max_position_embeddings) == (64, 32000, 4096)
        assert c.rope_parameters["rope_theta"] == 10000
        assert not c.tie_word_embeddings


def test_saved_and_loaded_the_operator_stays(tmp_path):
    model = model_of(small())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_impl"] == "naive_softpick_attn"
    assert AutoConfig.from_pretrained(tmp_path).attn_impl == "naive_softpick_attn"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "naive_softpick_attn"
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["attn_impl"] == "naive_softpick_attn"


def test_another_normalizer_is_refused_unless_the_field_is_set(tmp_path):
    model = model_of(small())
    model.save_pretrained(tmp_path)
    for other in ("sdpa", "eager", "naive_softmax_attn", "parallel_rectified_attn"):
        with pytest.raises(ValueError, match=f"{other}.*computes.*attn_impl='naive_softpick_attn'"):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=other)
        with pytest.raises(ValueError, match="computes"):
            model.set_attn_implementation(other)
        with pytest.raises(ValueError, match="computes"):
            AutoModelForCausalLM.from_config(small(), attn_implementation=other)
    # another operator for the same function is no change of function
    same = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="parallel_softpick_attn"
    )
    assert same.config._attn_implementation == "parallel_softpick_attn"
    assert same.config.attn_impl == "naive_softpick_attn"
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, attn_impl="naive_softmax_attn")
    assert not torch.allclose(by_name(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ValueError, match=r"must be one of.*got 'sofpick'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_impl="sofpick")


def test_softmax_arm_is_llama_with_sdpa(tmp_path):
    model_of(small(attn_impl="naive_softmax_attn")).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    sdpa = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(ours(TOKENS).logits, sdpa(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n.startswith("naive_")])
def test_every_operator_generates_the_same_with_and_without_cache(name):
    model = model_of(small(attn_impl=name))
    plain = {"max_new_tokens": 8, "do_sample": False}
    torch.testing.assert_close(
        model.generate(TOKENS, **plain), model.generate(TOKENS, use_cache=False, **plain)
    )


def test_triton_operator_in_the_model_matches_the_reference():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokens = model_of(small()).to(device), TOKENS.to(device)
    expected = model(tokens).logits
    model.set_attn_implementation("parallel_softpick_attn")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_triton_without_a_gpu_is_refused():
    with pytest.raises(UsageError, match="naive_softpick_attn"):
        require_device("parallel_softpick_attn", "cpu")


def test_trainer_forward_is_the_model_forward():
    config = small()
    titan = TitanModel(ModelArgs(config, seed=1))
    titan.init_weights()
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(titan.state_dict())
    torch.testing.assert_close(titan(TOKENS), model(TOKENS).logits, rtol=0, atol=0)


def test_flops_count():
    config = small()
    model = TitanModel(ModelArgs(config, seed=1))
    num_parameters, flops = ModelArgs(config, seed=1).get_nparams_and_flops(model, 256)
    embedding = config.vocab_size * config.hidden_size
    layer = 4 * 128 * 128 + 3 * 128 * 344 + 2 * 128
    assert num_parameters == 2 * embedding + 2 * layer + 128
    assert flops == 6 * (num_parameters - embedding) + 12 * 2 * 128 * 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size'; perhaps you meant 'hidden_size'"),
        ({"model_type": "llama"}, 'must have "model_type": "softpick_transformer", got \'llama\''),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "128.*3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads, got 4 and 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"head_dim": 33}, "even.*33"),
        ({"attn_impl": "softpick"}, "attn_impl must be one of.*got 'softpick'"),
        ({"hidden_act": "foo"}, "foo"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1.0}}, "foo"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be positive, got -1.0"),
        ({"pad_token_id": 500}, "[Pp]adding_idx"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
    ],
)
def test_impossible_config_is_one_line(tmp_path, change, message):
    raw = json.loads((CONFIGS / "softpick_transformer_tiny.json").read_text())
    file = tmp_path / "model.json"
    file.write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message) as error:
        read_config(file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


def test_unreadable_config_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_config(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        read_config(tmp_path / "text.json")
