"""Paths in flags and files: ``~`` is expanded, URLs are refused, commas within a name are kept."""

from pathlib import Path

import pytest

from flame.analysis.flags import parser as analyze_parser
from flame.base.errors import UsageError
from flame.base.paths import expand, split_list
from flame.config.parse import parse_args
from flame.convert import _parser as convert_parser
from flame.data.prepare import _parser as prepare_parser
from flame.data.text import load_documents
from flame.data.tokenizer import load_tokenizer
from flame.data.train_tokenizer import _parser as tokenizer_parser
from flame.sweep import _parser as sweep_parser
from flame.sweeps.plan import read_sweep

URLS = ["s3://bucket/x", "https://host/x", "file:///x"]
FLAGS = ["job.dump_folder", "model.config", "checkpoint.initial_load_path"]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


def test_trainer(tmp_path):
    recipe = ""
    for flag in FLAGS:
        section, option = flag.split(".")
        recipe += f'[{section}]\n{option} = "~/exp/x~y"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    words = [word for flag in FLAGS for word in (f"--{flag}", "~/exp/x~y")]
    for argv in (words, ["--job.config_file", "~/recipe.toml"]):
        config = parse_args(argv)
        assert {config.flags()[flag] for flag in FLAGS} == {str(tmp_path / "exp" / "x~y")}
        assert config.dump_folder == tmp_path / "exp" / "x~y"


@pytest.mark.parametrize("flag", ["job.config_file", *FLAGS])
def test_trainer_refuses_urls(flag):
    with pytest.raises(UsageError, match=rf"--{flag} 's3://b/x' is a URL; give a path"):
        parse_args([f"--{flag}", "s3://b/x"])


def test_nobodys_home_is_refused():
    with pytest.raises(
        UsageError, match=r"^--flag '~no-such-user/x' names the home folder of a user"
    ):
        expand("--flag", "~no-such-user/x")


def test_data_and_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert load_documents("~/a.txt") == ["text"]
    for url in URLS:
        with pytest.raises(ValueError, match=rf"^--training\.dataset '{url}' is a URL"):
            load_documents(url)
        with pytest.raises(ValueError, match=rf"^--model\.tokenizer_path '{url}' is a URL"):
            load_tokenizer(url)


@pytest.mark.parametrize(
    ("parser", "words", "given"),
    [
        (analyze_parser, "--out o", "out model run data"),
        (convert_parser, "dcp-to-hf --checkpoint c --model.config m --out o", "checkpoint out"),
        (convert_parser, "dcp-to-hf --checkpoint c --model.config m --out o", "model.config"),
        (
            convert_parser,
            "dcp-to-hf --checkpoint c --model.config m --out o",
            "model.tokenizer_path",
        ),
        (convert_parser, "hf-to-dcp --model m --out o", "model model.config out"),
        (prepare_parser, "", "out verify model.tokenizer_path"),
        (tokenizer_parser, "--out o --vocab_size 300", "out"),
    ],
)
def test_commands(tmp_path, parser, words, given):
    for name in given.split():
        flag = [f"--{name}", "~/x"]
        values = vars(parser().parse_args([*words.split(), *flag])).values()
        found = [value[0] if isinstance(value, list) and value else value for value in values]
        assert str(tmp_path / "x") in map(str, found), name
        with pytest.raises(UsageError, match=rf"--{name}: 's3://b' is a URL; give a path"):
            parser().parse_args([*words.split(), f"--{name}", "s3://b"])


def test_sweep(tmp_path):
    assert sweep_parser().parse_args(["~/a.toml"]).file == tmp_path / "a.toml"
    shipped = next(Path(__file__).parents[1].glob("configs/sweeps/*.toml")).read_text()
    [line] = [line for line in shipped.splitlines() if line.startswith("out = ")]
    file = tmp_path / "sweep.toml"
    file.write_text(shipped.replace(line, 'out = "~/sweeps/one"'))
    sweep = read_sweep(file)
    assert sweep.out == tmp_path / "sweeps" / "one"
    assert sweep.runs[0].folder.is_relative_to(sweep.out)
    file.write_text(shipped.replace(line, 'out = "s3://b/one"'))
    with pytest.raises(UsageError, match=r"sweep\.toml: out 's3://b/one' is a URL"):
        read_sweep(file)


def test_commas_of_existing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a,b/c,d.txt", "e"):
        path = tmp_path / name
        path.mkdir() if "." not in name else path.write_text("text")
    assert split_list("a,b") == ["a,b"]
    assert split_list("~/a,b/c,d.txt") == ["~/a,b/c,d.txt"]
    assert split_list("e,a,b,x,y") == ["e", "a,b", "x", "y"]
    assert split_list("python-docs,") == ["python-docs", ""]
    [source] = parse_args(["--training.dataset", "a,b/c,d.txt"]).training.sources()
    assert load_documents(source.dataset) == ["text"]
    both = ["--training.dataset", "a,b,e", "--training.data_probs", "0.5,0.5"]
    assert [s.dataset for s in parse_args(both).training.sources()] == ["a,b", "e"]
