"""`flame.generate` on the command line: what it writes, and one line for every mistake."""

import io
import re
import sys

import pytest
import torch
from small_model import write_model

from flame import generate
from flame.base.errors import UsageError
from flame.config.parse import parse_args
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerForCausalLM, key_ranges, read_config
from flame.run.generate import load, write


@pytest.fixture
def model(tmp_path):
    config = read_config(write_model(tmp_path, num_hidden_layers=1))
    folder = tmp_path / "hf"
    SoftpickTransformerForCausalLM(config).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return folder


def run(monkeypatch, *words, stdin=""):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    monkeypatch.setattr(sys, "argv", ["flame.generate", *map(str, words)])
    # the model has no Triton kernel, and is so small that a GPU has no part in it
    monkeypatch.setattr(generate.torch.cuda, "is_available", lambda: False)
    generate.main()


def refused(monkeypatch, capfd, *words):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *words)
    assert end.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_continues_the_prompt_the_same_for_a_seed(model, monkeypatch, capfd):
    words = ["--model", model, "--prompt", "abc", "--max_new_tokens", 8]
    texts = []
    for seed in (1, 1, 2):
        run(monkeypatch, *words, "--seed", seed)
        texts.append(capfd.readouterr().out)
    assert texts[0].startswith("abc")
    assert texts[0] == texts[1] != texts[2]


def test_says_how_fast_and_how_much_was_read(model, monkeypatch, capfd):
    run(monkeypatch, "--model", model, "--prompt", "abc", "--max_new_tokens", 7)
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"\[7 tokens, [\d.]+ tokens/s, \d+\.\d% of the values read\]", last)


def test_every_line_of_the_input_is_a_prompt(model, monkeypatch, capfd):
    words = ["--model", model, "--interactive", "--max_new_tokens", 3]
    run(monkeypatch, *words, stdin="one\n\ntwo\n")
    out, err = capfd.readouterr()
    assert out.startswith("one")
    assert "two" in out
    assert err.count("[3 tokens") == 3


def test_share_of_the_values_read(model):
    hf, tokenizer = load(str(model), "cpu")
    with key_ranges.count_reads() as reads:
        ids = write(hf, tokenizer, "some text", max_new_tokens=4, temperature=0)
    # of every step but the first the last query, as the weights of one pass have it
    (weights,) = hf(ids[None, :-1], output_attentions=True).attentions
    shares = [
        (weights[0, :, t, : t + 1] != 0).float().mean() for t in range(len(ids) - 4, len(ids) - 1)
    ]
    assert reads.share() == pytest.approx(torch.stack(shares).mean().item(), abs=1e-3)
    assert reads.steps == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "nan"], "--temperature must be 0, or between 0.01 and 100, got nan"),
        (
            ["--temperature", "1e-300"],
            "--temperature must be 0, or between 0.01 and 100, got 1e-300",
        ),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--max_new_tokens", "x"], "argument --max_new_tokens: invalid int value: 'x'"),
        (["--seed", "-1"], "--seed must be at least 0 and below 2^63, got -1"),
        (["--steps", "3"], "unrecognized option --steps"),
        (["--modle", "x"], "unrecognized option --modle; perhaps you meant --model "),
        (["--top_k", "0"], "--top_k must be at least 1, got 0"),
        (["--top_p", "1.5"], "--top_p must be above 0 and at most 1, got 1.5"),
        (["--top_p", "nan"], "--top_p must be above 0 and at most 1, got nan"),
        (["--top_k", "5", "--temperature", "0"], "--top_k has no effect with --temperature 0"),
        # what Python makes of bytes that are no UTF-8
        (["--prompt", "caf\udce9"], "--prompt must be text in UTF-8, got 'caf\\udce9'"),
        (["--model", "/nowhere"], "--model must be the folder of an exported model, got /nowhere"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(model, monkeypatch, capfd, words, message):
    assert message in refused(monkeypatch, capfd, "--model", model, "--prompt", "x", *words)


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_files_are_one_line_that_names_the_folder(model, monkeypatch, capfd, file, damage):
    if damage == "cut":
        (model / file).write_bytes((model / file).read_bytes()[:50])
    else:
        (model / file).unlink()
    line = refused(monkeypatch, capfd, "--model", model, "--prompt", "x")
    assert line.startswith(f"flame: error: --model {model} cannot be read: ")


def test_a_line_that_is_no_text_is_refused_by_name(model, monkeypatch, capfd):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", model, "--interactive", stdin="caf\udce9\n")
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("flame: error: --interactive: a line must be text in UTF-8, got 'caf")


def test_the_prompt_of_a_runs_sample_is_checked_before_the_run():
    with pytest.raises(
        UsageError, match=r"--sample.prompt must be text in UTF-8, got 'caf\\udce9'"
    ):
        parse_args(["--sample.prompt", "caf\udce9"])
