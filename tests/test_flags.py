"""Every flag does something, says what, and is one that upstream flame's commands may name."""

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from walk_flags import assigned_to_titan, flags_read, names_read, read_by_methods

import flame
from flame.base.command_line import Parser
from flame.base.errors import UsageError
from flame.config import sections as config_module
from flame.config.parse import parse_args
from flame.config.sections import JobConfig
from flame.config.upstream_flags import ONLY_VALUES, REFUSED, REFUSED_SECTIONS

ROOT = Path(__file__).parent.parent
PACKAGE = Path(flame.__file__).parent
TREE = JobConfig()
SECTIONS = {
    section.name: {option.name for option in dataclasses.fields(getattr(TREE, section.name))}
    for section in dataclasses.fields(TREE)
}
CLASSES = {type(getattr(TREE, name)).__name__: name for name in SECTIONS}

# read by `parse_args` and by a property of the tree themselves: they say where to read and to write
READ_BY_THE_TREE = {"job.config_file", "job.dump_folder"}

README_EXAMPLE = """
bash train.sh --job.config_file flame/models/fla.toml
  --job.dump_folder exp/transformer-340M-4K-10B/batch1.seqlen65536.context4096.warmup1024.update1.steps20480.lr3e-4.cosine
  --model.config configs/transformer_340M.json --model.tokenizer_path fla-hub/transformer-1.3B-100B
  --optimizer.name AdamW --optimizer.eps 1e-15 --optimizer.lr 3e-4
  --lr_scheduler.warmup_steps 1024 --lr_scheduler.lr_min 0.1 --lr_scheduler.decay_type cosine
  --training.batch_size 1 --training.seq_len 65536 --training.context_len 4096 --training.varlen
  --training.gradient_accumulation_steps 1 --training.steps 20480 --training.max_norm 1.0 --training.skip_nan_inf
  --training.dataset HuggingFaceFW/fineweb-edu --training.dataset_name sample-100BT --training.dataset_split train
  --training.streaming --training.num_workers 32 --training.prefetch_factor 2 --training.seed 42 --training.compile
  --checkpoint.interval 2048 --checkpoint.load_step -1 --checkpoint.keep_latest_k 2 --metrics.log_freq 1
"""

UPSTREAM_FLAGS = """
job: config_file dump_folder description use_for_integration_test print_args
model: name config tokenizer_path converters print_after_conversion norm_type
profiling: enable_profiling save_traces_folder profile_freq enable_memory_snapshot save_memory_snapshot_folder
optimizer: name eps lr implementation early_step_in_backward fused scheduler min_lr_ratio
lr_scheduler: warmup_steps decay_ratio decay_type lr_min
training: batch_size seq_len context_len varlen gradient_accumulation_steps steps max_norm skip_nan_inf dataset
  dataset_name dataset_split data_dir data_files data_probs streaming num_workers prefetch_factor
  data_parallel_replicate_degree data_parallel_shard_degree enable_cpu_offload tensor_parallel_degree
  disable_loss_parallel fsdp_reshard_after_forward mixed_precision_param mixed_precision_reduce compile gc_freq seed
  deterministic enable_l2wrap l2wrap_factor warmup_steps
metrics: log_freq enable_tensorboard disable_color_printing save_tb_folder save_for_all_ranks rank_0_only enable_wandb
checkpoint: enable_checkpoint folder interval export_dtype create_seed_checkpoint async_mode keep_latest_k load_step
  exclude_from_loading
activation_checkpoint: mode selective_ac_option
comm: init_timeout_seconds train_timeout_seconds trace_buf_size
memory_estimation: enabled disable_fake_mode
"""
"""Those of fla-org/flame, its README's older names among them. `checkpoint.model_weights_only` is
`checkpoint.last_save_model_weights_only` in later versions."""


def flags_that_nothing_reads(sections):
    found = set()
    config_source = (PACKAGE / "config" / "sections.py").read_text(encoding="utf-8")
    methods = read_by_methods(config_source, CLASSES)
    for file in PACKAGE.rglob("*.py"):
        if file != PACKAGE / "config" / "sections.py":
            source = file.read_text(encoding="utf-8")
            found |= flags_read(source, sections, CLASSES, methods)
    flags = {f"{section}.{option}" for section, options in sections.items() for option in options}
    return flags - found - READ_BY_THE_TREE


def test_every_flag_is_read_and_one_that_nothing_reads_is_found():
    sections = {**SECTIONS, "training": SECTIONS["training"] | {"frobnicate"}}
    assert flags_that_nothing_reads(sections) == {"training.frobnicate"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = config.training.steps", {"training.steps"}),
        ("def f(self):\n    return self.config.training.steps", {"training.steps"}),
        ("def f(config):\n    return config.training.steps", set()),
        ("def f(config: JobConfig):\n    return config.training.steps", {"training.steps"}),
        ("def f(config: HfConfig):\n    return config.training.steps", set()),
        (
            "def f(config: JobConfig):\n    c, t = Titan(), config.training\n    return t.steps",
            {"training.steps"},
        ),
        (
            "from flame.config.sections import Training\ndef f(t: Training):\n    return t.steps",
            {"training.steps"},
        ),
        # torchtitan has a class of that name
        (
            "from torchtitan.config import Training\ndef f(t: Training):\n    return t.steps",
            set(),
        ),
        (
            "def f(self):\n    config = self.config.training\n    return config.seed",
            {"training.seed"},
        ),
        (
            "class A:\n  def f(self, config: JobConfig):\n    self.x = config.training\n"
            "  def g(self):\n    return self.x.seed",
            {"training.seed"},
        ),
        # another function's name
        (
            "def f(config: JobConfig):\n    t = config.training\ndef g(t):\n    return t.steps",
            set(),
        ),
        # written, not read; torchtitan's; a string
        ("config.training.steps = 3", set()),
        ("x = c.training.steps + job_config.training.steps + t.steps", set()),
        ("x = getattr(config.training, 'steps')", set()),
    ],
)
def test_what_counts_as_reading(source, expected):
    assert flags_read(source, SECTIONS, CLASSES) == expected


def test_what_is_handed_to_torchtitan_is_read_there():
    spec = importlib.util.find_spec("torchtitan")
    titan = Path(spec.submodule_search_locations[0])
    # what its other models and experiments read does not help ours
    read = names_read(titan, without=("models", "experiments", "config", "hf_datasets"))
    # a new attribute would be made without a word
    job_config = titan / "config" / "job_config.py"
    known = {
        node.name: {x.target.id for x in node.body if isinstance(x, ast.AnnAssign)}
        for node in ast.parse(job_config.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    sections = {
        x.target.id: ast.unparse(x.annotation)
        for node in ast.parse(job_config.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "JobConfig"
        for x in node.body
        if isinstance(x, ast.AnnAssign)
    }
    assigned = assigned_to_titan((PACKAGE / "titan" / "config.py").read_text(encoding="utf-8"))
    assert len(assigned) > 30
    for name in assigned:
        section, option = name.split(".")
        assert option in known[sections[section]], name
        assert option in read, name


def help_on(*topic):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["-h", *topic])
    assert exit_.value.code == 0


def test_help_names_every_flag_with_its_meaning_and_default(capsys):
    help_on("all")
    text = capsys.readouterr().out
    entries = dict(re.findall(r"^--(\w+\.\w+)(.*?)(?=^--|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(entries) == list(TREE.flags())
    for name, entry in entries.items():
        meaning, _, default = " ".join(entry.split()).partition(" (default: ")
        assert len(meaning.split()) > 1, name
        assert default or "Default: " in meaning, name
    assert "--training.compile, --training.no_compile\n" in text
    assert "--optimizer.name AdamW|Adam\n" in text
    # a docstring below every field
    for node in ast.parse(Path(config_module.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            fields = [i for i, x in enumerate(node.body) if isinstance(x, ast.AnnAssign)]
            for i in fields:
                following = node.body[i + 1] if i + 1 < len(node.body) else None
                is_text = isinstance(following, ast.Expr) and isinstance(
                    getattr(following.value, "value", None), str
                )
                assert is_text, f"{node.name}.{ast.unparse(node.body[i].target)}"


def test_help_is_short_and_goes_into_one_section(capsys):
    help_on()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 80
    words = set(" ".join(lines).split())
    assert words >= SECTIONS.keys() | {name for names in SECTIONS.values() for name in names}
    assert words >= {
        "NGPU",
        "MASTER_PORT",
        "HIP_VISIBLE_DEVICES",
        "CUDA_VISIBLE_DEVICES",
        "NNODE",
        "NODE_RANK",
        "MASTER_ADDR",
    }
    for topic, flags in (
        ("sample", {f"sample.{name}" for name in SECTIONS["sample"]}),
        ("--training.seed", {"training.seed"}),
        ("warmup_steps", {"lr_scheduler.warmup_steps"}),
    ):
        help_on(topic)
        text = capsys.readouterr().out
        assert set(re.findall(r"^--(\S+?),? ", text, re.MULTILINE)) == flags
    with pytest.raises(UsageError, match="-h trainin: no such section or flag; .* -h training"):
        parse_args(["-h", "trainin"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.step", "3"], "--training.step; perhaps you meant --training.steps "),
        (["--lr", "1"], "--lr; perhaps you meant --optimizer.lr "),
        (["--training.lr=1"], "--training.lr; perhaps you meant --optimizer.lr "),
        (["--training.learning_rate", "1"], "learning_rate; perhaps you meant --optimizer.lr "),
        (["--no_compile"], "--no_compile; perhaps you meant --training.no_compile "),
        (["--training.batch-sizes", "1"], "perhaps you meant --training.batch_size "),
        (["--frobnicate", "1"], "unrecognized option --frobnicate .bash"),
        (["--training.compile", "true"], "--training.compile takes no value, got 'true'"),
        (["--training.compile=False"], "--training.compile takes no value, got 'False'"),
        (
            ["--sample.prompt", "caf\udce9"],
            r"--sample.prompt must be text in UTF-8, got 'caf.udce9'",
        ),
        (["--job.dump_folder=caf\udce9"], "--job.dump_folder must be text in UTF-8"),
        (["--job.config_file", "caf\udce9"], "--job.config_file must be text in UTF-8"),
    ],
)
def test_the_flag_that_was_meant(argv, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_args(argv)
    assert "\n" not in str(error.value)


def test_the_flag_that_was_meant_in_the_small_commands():
    parser = Parser(prog="program")
    parser.add_argument("--model", required=True)
    parser.add_argument("--interactive", action="store_true")
    for words, message in (
        (["--modle", "x"], "option --modle; perhaps you meant --model .program -h"),
        (["--model", "x", "--interactive", "true"], "--interactive takes no value, got 'true'"),
        (["--model", "caf\udce9"], "--model must be text in UTF-8, got"),
    ):
        with pytest.raises(UsageError, match=message):
            parser.parse_args(words)
    assert parser.parse_args(["--model=--x", "--interactive"]).model == "--x"


def upstream_flags():
    section = None
    for word in UPSTREAM_FLAGS.split():
        if word.endswith(":"):
            section = word[:-1]
        else:
            yield f"{section}.{word}"


def test_every_upstream_flag_is_there_or_refused_by_name():
    ours = TREE.flags().keys()
    assert [flag for flag in upstream_flags() if flag not in ours and flag not in REFUSED] == []


def test_no_flag_is_both_there_and_refused():
    assert not TREE.flags().keys() & REFUSED.keys()
    assert not SECTIONS.keys() & REFUSED_SECTIONS.keys()
    known = TREE.flags().keys() | set(upstream_flags())
    for advice in (*REFUSED.values(), *REFUSED_SECTIONS.values()):
        named = [word.strip(",;") for word in advice.split() if word.startswith("--")]
        for flag in named:
            assert flag.removeprefix("--") in known, f"{advice}: no such flag {flag}"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optimizer.fused"], "--optimizer.fused is not supported: use --optimizer.impl"),
        (["--float8.recipe_name", "rowwise"], "--float8.recipe_name is not supported"),
        (["--model.converters=float8"], "--model.converters is not supported"),
        (["--training.no_enable_l2wrap"], "--training.no_enable_l2wrap is not supported"),
        (["--metrics.attention_freq", "3", "--validation.share", "0"], "attention_freq must be 0"),
        (
            ["--metrics.attention_length", "65", "--training.seq_len", "64"],
            "attention_length must be at most --training.seq_len 64",
        ),
        (["--profiling.profile_freq", "3"], "--profiling.profile_freq must be at least 4, got 3"),
        (["--profiling.save_traces_folder", "a/b"], "save_traces_folder must be the name"),
        (
            ["--comm.train_timeout_seconds", "0"],
            "train_timeout_seconds must be between 1 and 2000000",
        ),
        (["--training.max_skipped_steps", "0"], "max_skipped_steps must be at least 1"),
        (["--metrics.spike_window", "1"], "spike_window must be at least 2"),
        (["--metrics.max_dumps", "-1"], "max_dumps must be at least 0"),
        (["--memory_estimation.disable_fake_mode"], "--memory_estimation.enabled"),
    ],
)
def test_refusals(argv, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_args(argv)
    assert "\n" not in str(error.value)


def written(flag, value):
    """The words that give a flag that value, and its line in a recipe."""
    section, option = flag.split(".")
    if isinstance(value, bool):
        switch = option if value else f"no_{option}"
        return [[f"--{section}.{switch}"]], f"[{section}]\n{option} = {str(value).lower()}\n"
    quoted = value if value.isdecimal() else f'"{value}"'
    return [[f"--{flag}", value], [f"--{flag}={value}"]], f"[{section}]\n{option} = {quoted}\n"


@pytest.mark.parametrize("flag", ONLY_VALUES)
def test_a_flag_that_has_one_value_is_read_with_it_and_refused_with_another(flag, tmp_path):
    assert flag in REFUSED
    file = tmp_path / "recipe.toml"
    only = ONLY_VALUES[flag]
    spellings, line = written(flag, only)
    file.write_text(line)
    for words in (*spellings, ["--job.config_file", str(file)]):
        config = parse_args([*words, "--training.steps", "3"])
        assert config.flags() == TREE.flags() | {
            "training.steps": 3,
            "job.config_file": config.job.config_file,
        }
    spellings, line = written(flag, not only if isinstance(only, bool) else "2")
    file.write_text(line)
    for words in (*spellings, ["--job.config_file", str(file)]):
        with pytest.raises(UsageError, match=f"--{flag} is not supported: leave it out") as error:
            parse_args([*words, "--training.steps", "3"])
        assert "\n" not in str(error.value)


def test_refusals_reach_into_the_file(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text("[float8]\nenable_fsdp_float8_all_gather = false\n")
    with pytest.raises(UsageError, match="float8"):
        parse_args(["--job.config_file", str(file)])


def test_example_of_upstream_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_args(shlex.split(README_EXAMPLE)[2:])
    assert (config.training.steps, config.training.seq_len, config.training.batch_size) == (
        20480,
        65536,
        1,
    )
    assert config.training.skip_nan_inf
    assert config.metrics.log_freq == 1
    assert config.checkpoint.load_step == -1
    assert Path(config.model.config).is_file()


def test_recipe_of_upstream_is_a_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_args(["--job.config_file", "flame/models/fla.toml", "--optimizer.lr", "1e-3"])
    assert config.optimizer.lr == 1e-3
    assert config.lr_scheduler.warmup_steps == 1024
    assert config.training.skip_nan_inf
