"""What libraries call of ours: every keyword is taken, handed on, or refused by name."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from small_model import write_model
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import DynamicCache
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.utils.generic import TransformersKwargs

import flame
from flame.models import SoftpickTransformerForCausalLM, read_config
from flame.models.attention import attention_forward
from flame.models.attention_layer import NormalizedAttention
from flame.models.key_ranges import causal_key_ranges
from flame.models.keywords import HARMLESS

ROOT = Path(__file__).parent.parent


def named(function):
    """Parameters that are not ``*args`` or ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def has_keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind == p.VAR_KEYWORD for p in parameters)


ATTENTION = attention_forward("naive_softpick_attn")
# transformers gives its own functions alone: a work-around for torch 2.4, and the pages of continuous batching (5.19 to
# 5.23), for which it takes no other function
NOT_GIVEN = {"allow_torch_fix", "cache"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ATTENTION, sdpa_attention_forward),
        (ATTENTION, flash_attention_forward),
        (ATTENTION, eager_attention_forward),
        (NormalizedAttention.forward, LlamaAttention.forward),
        (causal_key_ranges, masking_utils.sdpa_mask),
        (causal_key_ranges, masking_utils.eager_mask),
        (causal_key_ranges, masking_utils.flash_attention_mask),
    ],
)
def test_every_argument_of_the_library_is_known(ours, theirs):
    assert named(theirs) - named(ours) <= NOT_GIVEN


def test_keywords_of_every_model_are_known():
    given = set(TransformersKwargs.__annotations__)
    assert given <= named(ATTENTION) | set(HARMLESS)
    assert given <= named(NormalizedAttention.forward) | set(HARMLESS)


def overrides():
    """Methods of ours that take the place of a library's, and these."""
    for info in pkgutil.walk_packages(flame.__path__, "flame."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and cls.__module__ == info.name):
                continue
            bases = [
                b
                for b in cls.__mro__
                if b.__module__.partition(".")[0] not in ("flame", "builtins", "typing")
            ]
            for name, method in vars(cls).items():
                theirs = next((vars(b)[name] for b in bases if name in vars(b)), None)
                if name != "__init__" and inspect.isfunction(method) and inspect.isfunction(theirs):
                    yield method, theirs


def test_overriding_methods_take_what_the_library_gives():
    methods = list(overrides())
    assert len(methods) > 10
    for ours, theirs in methods:
        assert has_keywords(ours) or named(theirs) <= named(ours), ours


def swallowed(function, name):
    """Whether ``**name`` is left alone, or only asked for some of its keys."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id == name:
            parent = parents[node]
            is_key = isinstance(parent, ast.Subscript | ast.Compare)
            is_key |= isinstance(parent, ast.Attribute) and parent.attr in ("get", "pop")
            is_key |= isinstance(parent, ast.AugAssign)
            if not is_key:
                return False
    return True


def test_no_function_swallows_keywords():
    functions = [
        (file.relative_to(ROOT), node)
        for folder in ("flame", "fla")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.args.kwarg
    ]
    assert len(functions) > 10
    assert [
        f"{file}:{f.lineno} {f.name}" for file, f in functions if swallowed(f, f.args.kwarg.arg)
    ] == []


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = read_config(write_model(tmp_path, num_hidden_layers=1))
    return SoftpickTransformerForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_fills_the_cache_under_both_names(model, name):
    ids = torch.arange(11)[None]
    expected = model(ids).logits
    decoder, cache = model.model, DynamicCache(config=model.config)
    for t in range(11):
        hidden = decoder.embed_tokens(ids[:, t : t + 1])
        positions = torch.tensor([[t]])
        hidden = (
            hidden
            + decoder.layers[0].self_attn(
                hidden_states=decoder.layers[0].input_layernorm(hidden),
                position_embeddings=decoder.rotary_emb(hidden, positions),
                **{name: cache},
            )[0]
        )
        hidden = hidden + decoder.layers[0].mlp(decoder.layers[0].post_attention_layernorm(hidden))
        got = model.lm_head(decoder.norm(hidden))
        torch.testing.assert_close(got[0, 0], expected[0, t], rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 11


def test_unknown_keywords_are_refused(model):
    layer = model.model.layers[0].self_attn
    hidden = torch.randn(1, 3, 32)
    place = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(3)[None])}
    cache = DynamicCache(config=model.config)
    for keyword in ("past_key_value", "kv_cache", "past"):
        with pytest.raises(
            TypeError, match=f"NormalizedAttention does not know the keyword '{keyword}'"
        ):
            layer(hidden, **place, **{keyword: cache})
    with pytest.raises(TypeError, match="one cache: cache or past_key_values"):
        layer(hidden, **place, cache=cache, past_key_values=cache)
    q, k, v = torch.randn(3, 1, 4, 5, 8)
    with pytest.raises(TypeError, match="naive_softpick_attn does not know the keyword 'indices'"):
        AttentionInterface()["naive_softpick"](layer, q, k, v, None, indices=None)
    with pytest.raises(NotImplementedError, match="adds nothing to scores, got a position_bias"):
        ATTENTION(layer, q, k, v, None, position_bias=torch.zeros(5, 5))
    assert ATTENTION(layer, q, k, v, None, **dict.fromkeys(HARMLESS))[0].shape == (1, 5, 4, 8)


def test_additions_count_the_keys_of_a_packed_document(tmp_path):
    torch.manual_seed(0)
    additions = dict.fromkeys(("attn_sink", "attn_gate", "attn_log_scale"), True)
    config = read_config(write_model(tmp_path, num_hidden_layers=1, **additions))
    model = SoftpickTransformerForCausalLM(config).eval()
    a, b, c = torch.arange(30).split((9, 6, 15))
    rows = torch.stack([torch.cat([a, b]), c])
    positions = torch.stack([torch.cat([torch.arange(9), torch.arange(6)]), torch.arange(15)])
    got = model(rows, position_ids=positions).logits
    alone = [model(x[None]).logits[0] for x in (a, b, c)]
    torch.testing.assert_close(got.flatten(0, 1), torch.cat(alone), rtol=1e-4, atol=1e-5)
