"""The trainer's flags: defaults, files, and one line for every mistake."""

import pytest

from flame.base.errors import UsageError
from flame.config.parse import parse_args
from flame.config.sections import JobConfig


def test_no_flags_gives_the_defaults():
    assert parse_args([]).flags() == JobConfig().flags()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[training]\nsteps = 7\ncompile = true\nseed = 1\n[optimizer]\nlr = 1e-4\n")
    config = parse_args(["--training.steps", "8", "--job.config_file", str(file)])
    assert config.training.steps == 8
    assert config.training.seed == 1
    assert config.training.compile
    assert config.optimizer.lr == 1e-4
    assert config.training.batch_size == JobConfig().training.batch_size


def test_written_file_reads_back(tmp_path):
    argv = [
        "--training.compile",
        '--sample.prompt=--a "quoted"\n\x7f \N{CAT FACE}',
        "--training.steps",
        "9",
    ]
    config = parse_args(argv)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    again = parse_args(["--job.config_file", str(file)])
    assert {**again.flags(), "job.config_file": None} == config.flags()


def test_dump_folder_is_named_after_the_model_config():
    config = parse_args(["--model.config", "configs/softmax_transformer_tiny.json"])
    assert str(config.dump_folder) == "exp/softmax_transformer_tiny"
    assert str(parse_args(["--job.dump_folder", "a/b"]).dump_folder) == "a/b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.stepz", "3"], r"--training\.stepz.*--training\.steps"),
        (["--training.steps", "many"], r"--training\.steps.*many"),
        (["--training.steps", "0"], r"--training\.steps must be at least 1, got 0"),
        (["--training.steps"], r"Missing value.*--training\.steps"),
        (["--optimizer.name", "SGD"], r"SGD.*--optimizer\.name.*AdamW"),
        (["--optimizer.lr", "nan"], r"--optimizer\.lr must be positive, got nan"),
        (["--optimizer.lr", "inf"], r"--optimizer\.lr must be finite, got inf"),
        (["--validation.share", "1"], r"--validation\.share must be at least 0 and below 1, got 1"),
        (
            ["--checkpoint.keep_latest_k", "-1"],
            r"--checkpoint\.keep_latest_k must be at least 0, got -1",
        ),
        (["--lr_scheduler.decay_ratio", "2"], r"--lr_scheduler\.decay_ratio must be above 0"),
        (["--checkpoint.folder", "../other"], r"--checkpoint\.folder must be the name of a folder"),
        (["--metrics.save_tb_folder", "/tb"], r"--metrics\.save_tb_folder must be the name"),
        (["--job.dump_folder", ""], r"--job\.dump_folder must be a folder, got \'\'"),
        (["--checkpoint.folder", "record"], r"--checkpoint\.folder must be.*none of hf, record"),
        (["--metrics.save_tb_folder", "lock"], r"--metrics\.save_tb_folder must be.*lock"),
        (
            ["--checkpoint.folder", "tb"],
            r"--checkpoint\.folder must be a folder of its own, not that of --metrics\.save_tb_folder",
        ),
        (
            ["--metrics.spike_window", "9" * 30],
            r"--metrics\.spike_window must be at most 2147483647",
        ),
        (["--training.seed", str(2**63)], r"--training\.seed must be at least 0 and below 2\^63"),
        (["--comm.init_timeout_seconds", "9999999"], r"must be between 1 and 2000000, got 9999999"),
        (["--comm.trace_buf_size", "9999999"], r"must be between 0 and 1000000, got 9999999"),
        (["--sample.temperature", "1e-300"], r"must be 0, or between 0\.01 and 100, got 1e-300"),
        (["--job.config_file"], r"--job\.config_file"),
        (["stray"], "stray"),
        (["--job.config_file", "missing.toml"], r"--job\.config_file.*missing\.toml"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_args(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training = 3", "training.*section"),
        ("[training]\nstepz = 3", r"--training\.stepz"),
        ('[training]\nsteps = "x"', r"--training\.steps.*x"),
        ("[nonsense]\na = 3", r"--nonsense\.a"),
        ("[training", "TOML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, text, message):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        parse_args(["--job.config_file", str(file)])
    assert "\n" not in str(error.value)
