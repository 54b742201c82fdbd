"""`python -m flame.sweep`: the file, and what is refused before a run starts."""

from pathlib import Path

import pytest
from sweep_standins import run_main

from flame.base.errors import UsageError
from flame.sweeps import check
from flame.sweeps.plan import read_sweep
from flame.sweeps.state import read_state

ROOT = Path(__file__).parents[2]


def test_runs_of_a_file(write, tmp_path):
    found = read_sweep(write(("[2e-3]", "[2e-3, 0.01]")))
    names = [run.name for run in found.runs]
    assert names == [
        "softmax/lr0.002-seed1",
        "softmax/lr0.002-seed2",
        "softmax/lr0.01-seed1",
        "softmax/lr0.01-seed2",
        "softpick/lr0.002-seed1",
        "softpick/lr0.01-seed1",
    ]
    run = found.runs[3]
    assert run.folder == run.config.dump_folder == tmp_path / "out/softmax/lr0.01-seed2"
    assert (run.config.optimizer.lr, run.config.training.seed) == (0.01, 2)
    assert run.config.training.seq_len == 32
    assert run.config.model.config == str(tmp_path / "out/models/softmax.json")
    assert found.model_keys(found.arms[0])["attn_impl"] == "naive_softmax_attn"
    assert found.model_keys(found.arms[1])["attn_impl"] == "naive_softpick_attn"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "small"', "name =", "is not the TOML file of a sweep: "),
        ('name = "small"', "", "at the top: name is missing; it must be the sweep's name"),
        (
            "seeds = [1, 2]",
            "seed = [1, 2]",
            "at the top: seeds is missing; it must be a list, without",
        ),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must be a list, without repetition, of "),
        ("seeds = [1, 2]", "seeds = [-1]", "integers of at least 0, got [-1]"),
        ("seeds = [1, 2]", "seeds = []", "integers of at least 0, got []"),
        ("seeds = [1, 2]", "seeds = [true]", "integers of at least 0, got [True]"),
        ("[2e-3]", "[0]", "learning_rates must be a list, without repetition, of positive"),
        ("[2e-3]", "0.1", "of positive numbers, got 0.1"),
        ("[2e-3]", "[inf]", "of positive numbers, got [inf]"),
        ("[run]", "[runs]", "at the top: unknown key 'runs'; there are name, out, seeds, "),
        ("ngpu = 1", "ngpu = 5", "[run]: ngpu must be an integer from 1 to 4, got 5"),
        ("ngpu = 1", "parallel = 1", "[run]: parallel must be true or false, got 1"),
        ("ngpu = 1", "gpus = 1", "[run]: unknown key 'gpus'; there are ngpu, parallel, runs_per"),
        ("ngpu = 1", "runs_per_gpu = 0", "runs_per_gpu must be an integer of at least 1, got 0"),
        (
            "ngpu = 1",
            "ngpu = 2\nparallel = true\nruns_per_gpu = 6",
            "[run]: runs_per_gpu must be 1 unless ngpu is 1 and parallel is true, here 2 and true, got 6",
        ),
        (
            "ngpu = 1",
            "runs_per_gpu = 6",
            "[run]: runs_per_gpu must be 1 unless ngpu is 1 and parallel is true, here 1 and false",
        ),
        ("[analyze]", "[analyze]\nbits = [5]", "[analyze]: bits must be a list, without "),
        ("[analyze]", "[analyze]\nheld_out = 1", "held_out must be true or false, got 1"),
        ("[analyze]", "[analyze]\nsamples = 0", "samples must be an integer of at least 1, got 0"),
        ("[arms.softpick]", "[arms.models]", "[arms.models]: an arm's name must be"),
        ('attn_impl = "naive_softpick_attn"', "", "[arms.softpick]: attn_impl is missing; each"),
        ("[arms.softpick]", '[arms."a/b"]', "[arms.a/b]: an arm's name must be letters"),
        ("seeds = [1]\n", "seeds = 1\n", "[arms.softpick]: seeds"),
        (
            "training.steps = 300",
            "training.stepz = 300",
            "[base]: unrecognized option --training.stepz; perhaps you meant --training.steps",
        ),
        (
            "training.steps = 300",
            "training.steps = 0",
            "--training.steps must be at least 1, got 0",
        ),
        ("training.steps = 300", "steps = 300", "[base]: key 'steps' is outside a [section]"),
        (
            "training.steps = 300",
            "training.seed = 3",
            "[base]: training.seed must be left out: `seeds` lists them",
        ),
        (
            "training.steps = 300",
            'job.dump_folder = "x"',
            "[base]: job.dump_folder must be left out: each run has a folder",
        ),
        (
            "training.steps = 300",
            "optimizer.lr = 0.1",
            "optimizer.lr must be left out: `learning_rates`",
        ),
        ("training.steps = 300", "validation.share = 0", "[base]: validation.share must be above"),
        (
            "training.steps = 300",
            "checkpoint.enable_checkpoint = false",
            "[base]: checkpoint.enable_checkpoint must be true, its default, in a sweep, got false",
        ),
        ("model.config = ", "model.tokenizer_path = ", "[base]: model.config must name the JSON"),
        (
            "[analyze]",
            "[analyze]\nlengths = [1]",
            "[analyze]: lengths must be a list, without repetition, of integers of at least 2, got [1]",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(write, old, new, words):
    file = write((old, new))
    with pytest.raises(UsageError) as error:
        read_sweep(file)
    assert words in str(error.value)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'attn_impl = "naive_softmax_attn"',
            "attn_impl = 3",
            "[arms.softmax]: {out}/models/softmax.json",
        ),
        ("[arms.softpick]", "[arms.softpick]\nsink = 1", "softpick.json has an unknown key 'sink'"),
        (
            "[analyze]",
            "[analyze]\nlengths = [32, 1024]",
            "must be at most max_position_embeddings 512",
        ),
    ],
)
def test_a_mistake_in_an_arm_is_one_line(write, tmp_path, old, new, words):
    file = write((old, new))
    with pytest.raises(UsageError) as error:
        check.measure_arms(read_sweep(file))
    assert words.format(out=tmp_path / "out") in str(error.value)
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "out").exists()


def test_what_the_runs_would_refuse_is_refused_before_the_first(write, tmp_path, monkeypatch):
    for change, words in [
        (("training.seq_len = 32", "training.seq_len = 1024"), "--training.seq_len 1024 must be"),
        (("training.seq_len", "training.tensor_parallel_degree = 3\ntraining.seq_len"), "degree"),
        (("text.txt", "none.txt"), "none.txt"),
        (
            (f'data = "{tmp_path}/text.txt"', 'data = "./none"'),
            "[analyze]: --data './none': no such",
        ),
        (("[analyze]", "[analyze]\nsamples = 9999"), "[analyze]: --samples 9999: --data"),
        (("[analyze]", "[analyze]\npasskey_lengths = [50]"), "--passkey_lengths 50: length must"),
    ]:
        file = write(change)
        with pytest.raises(UsageError) as error:
            check.check_runs(read_sweep(file))
        assert words in str(error.value)
        assert str(file) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "/out"])
def test_out_that_is_no_folder_is_refused(write, tmp_path, monkeypatch, capsys, below):
    (tmp_path / "file").touch()
    file = write((f'out = "{tmp_path}/out"', f'out = "{tmp_path}/file{below}"'))
    assert run_main(monkeypatch, file, "--dry_run") == 2
    words = f"{file}: out {tmp_path}/file{below} must be a folder, but {tmp_path}/file is not one"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", "[1]\n"), ("metrics.jsonl", "{}\n"), ("record/001.json", "")],
)
def test_a_damaged_run_folder_is_one_line(write, name, content):
    run = read_sweep(write()).runs[0]
    (run.folder / "record").mkdir(parents=True)
    (run.folder / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name}(, line 1 is damaged| cannot be read)"):
        read_state(run)


def shipped():
    return sorted((ROOT / "configs/sweeps").glob("*.toml"))


@pytest.mark.parametrize("file", shipped(), ids=lambda file: file.stem)
def test_every_shipped_sweep_can_be_built(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    sizes = check.measure_arms(read_sweep(file.relative_to(ROOT)))
    # the arms differ in parameters by what an arm adds alone
    assert max(s.parameters for s in sizes.values()) <= 1.1 * min(
        s.parameters for s in sizes.values()
    )
