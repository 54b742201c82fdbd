"""`flame.generate` on an exported model: what it prints, counts and refuses."""

import io
import re
from pathlib import Path

import pytest
import torch

import flame.models
from flame import generate
from flame.data import load_tokenizer
from flame.models import key_ranges

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    config = flame.models.read_config(ROOT / "configs" / "softpick_transformer_tiny.json")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    flame.models.SoftpickTransformerForCausalLM(config).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return folder


def run(monkeypatch, *argv, stdin=""):
    monkeypatch.setattr("sys.argv", ["flame.generate", *map(str, argv)])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    generate.main()


def test_prompt_is_continued_and_counted(exported, monkeypatch, capsys):
    flags = ["--model", exported, "--prompt", "The ", "--max_new_tokens", 7, "--temperature", 0]
    run(monkeypatch, *flags)
    out, err = capsys.readouterr()
    expected = generate.generate(str(exported), "The ", max_new_tokens=7, temperature=0)
    assert out == expected + "\n"
    assert re.fullmatch(r"\[7 tokens, [\d.]+ tokens/s, \d+\.\d% of the values read\]\n", err)


def test_every_line_of_the_input_is_a_prompt(exported, monkeypatch, capsys):
    flags = ["--model", exported, "--interactive", "--max_new_tokens", 3, "--temperature", 0]
    run(monkeypatch, *flags, stdin="one\n\ntwo\n")
    out, err = capsys.readouterr()
    assert out.startswith("one")
    assert "\ntwo" in out
    assert err.count("[3 tokens") == 3


def test_share_of_the_values_read(exported):
    model, tokenizer = generate.load(str(exported), "cpu")
    with key_ranges.count_reads() as reads:
        ids = generate.write(model, tokenizer, "some text", max_new_tokens=4, temperature=0)
    # of every layer's last query of the steps after the first, as the weights of one pass have it
    attentions = model(ids[None, :-1], output_attentions=True).attentions
    shares = [
        (layer[0, :, t, : t + 1] != 0).float().mean(-1)
        for layer in attentions
        for t in range(len(ids) - 4, len(ids) - 1)
    ]
    assert reads.share() == pytest.approx(torch.stack(shares).mean().item(), abs=1e-3)
    assert reads.steps == 3 * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "./nowhere", "--prompt", "x"], "--model: .*nowhere does not exist"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens at least 1"),
    ],
)
def test_mistakes_are_one_line(exported, flags, message, monkeypatch, capsys):
    flags = flags if "--model" in flags else ["--model", exported, *flags]
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *flags)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(rf"flame: error: .*{message}.*\n", err), err
