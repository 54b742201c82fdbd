"""The lengths that `flame.analyze` measures if none are given."""

import json
import shutil

import pytest
from analyze_runs import run

from flame.analysis.lengths import default_lengths, training_length
from flame.analysis.records import Results, read_records


@pytest.mark.parametrize(
    ("trained", "most", "expected"),
    [
        ([256], [4096], [16, 64, 256]),
        ([1000, 1000], [None], [16, 64, 256, 1000]),
        # none is beyond what one of the models was trained at, or takes
        ([1024, 128, None], [4096, 4096, 4096], [16, 64, 128]),
        ([512], [100], [16, 64, 100]),
        ([12], [12], [12]),
        ([None], [None], [128, 512]),
        ([None, None], [None, 300], [128]),
        ([None], [64], [64]),
    ],
)
def test_default_lengths_end_at_the_training_length(trained, most, expected):
    assert default_lengths(trained, most) == expected


def test_pieces_of_packed_documents_are_the_training_length():
    assert training_length({"--training.seq_len": 512, "--training.context_len": None}) == 512
    assert training_length({"--training.seq_len": 512, "--training.context_len": 128}) == 128
    assert training_length({}) is None


@pytest.mark.parametrize("is_given_as_run", [False, True])
def test_a_run_says_the_training_length_and_the_seed(
    models, monkeypatch, tmp_path, is_given_as_run
):
    trained = tmp_path / "trained"
    model = tmp_path / "elsewhere" / "hf" if is_given_as_run else trained / "hf"
    shutil.copytree(models / "softpick-0" / "hf", model)
    shutil.copytree(models / "softpick-0", trained, dirs_exist_ok=True)
    (trained / "run.json").write_text(json.dumps({"--training.seq_len": 32, "--training.seed": 7}))
    words = ["--model", model, "--data", models / "text.txt", "--samples", 1]
    words += ["--run", trained] if is_given_as_run else []
    run(monkeypatch, *words, "--first_token", "bos", "--out", tmp_path / "out")
    results = Results(read_records(tmp_path / "out" / "records.jsonl"))
    assert results.lengths == [16, 32]
    assert [(r["training_length"], r["seed"]) for r in results.models] == [(32, 7)]


def test_a_damaged_file_of_a_run_names_the_model(models, monkeypatch, tmp_path, capfd):
    trained = tmp_path / "trained"
    shutil.copytree(models / "softpick-0", trained)
    (trained / "run.json").write_text("{")
    words = ["--model", trained / "hf", "--data", models / "text.txt", "--samples", 1]
    with pytest.raises(SystemExit):
        run(monkeypatch, *words, "--out", tmp_path / "out")
    error = capfd.readouterr().err
    assert error.startswith(f"flame: error: --model {trained / 'hf'}: ")
    assert f"{trained / 'run.json'} cannot be read" in error
