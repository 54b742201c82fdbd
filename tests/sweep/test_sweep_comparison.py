"""`python -m flame.sweep`: arms that start alike, the table of losses, costs."""

import json
import math
import time

import pytest
import torch

from flame.analysis import flags
from flame.base.errors import UsageError
from flame.data.run_data import open_data
from flame.run.inputs import read_model, read_tokenizer
from flame.sweeps import check
from flame.sweeps.cost import estimate, require_disk
from flame.sweeps.plan import read_sweep
from flame.sweeps.report import analysis_flags, best_runs, fitted_minimum, loss_table
from flame.sweeps.state import State, read_state
from flame.titan.model import ModelArgs, TitanModel


def test_arms_of_a_seed_start_alike(write, tmp_path):
    """The weights of step 0 to the bit, those aside that an arm adds, and the batches."""
    fields = 'attn_impl = "naive_softmax_attn"\nattn_gate = true\nattn_sink = true'
    file = write(("seeds = [1]\n", f"[arms.more]\n{fields}\n"))
    found = read_sweep(file)
    weights, batches = {}, {}
    (tmp_path / "out/models").mkdir(parents=True)
    for arm in found.arms:
        found.model_file(arm.name).write_text(check.model_json(found, arm))
    for run in found.runs:
        config = read_model(run.config, 1)
        with torch.device("meta"):
            model = TitanModel(ModelArgs(config, run.config.training.seed))
        model.to_empty(device="cpu")
        model.init_weights()
        data = open_data(run.config, read_tokenizer(run.config, config))
        loader = iter(data.loader(dp_rank=0, dp_world_size=1))
        key = run.arm, run.seed
        weights[key] = {name: p.detach().clone() for name, p in model.named_parameters()}
        batches[key] = [next(loader)[0]["input"] for _ in range(3)]
    for seed in (1, 2):
        one = weights["softmax", seed]
        assert one.keys() == weights["softpick", seed].keys() < weights["more", seed].keys()
        for arm in ("softpick", "more"):
            assert all(torch.equal(one[name], weights[arm, seed][name]) for name in one)
            pairs = zip(batches["softmax", seed], batches[arm, seed], strict=True)
            assert all(torch.equal(x, y) for x, y in pairs)
    name = "lm_head.weight"
    assert not torch.equal(weights["softmax", 1][name], weights["softmax", 2][name])
    assert not torch.equal(batches["softmax", 1][0], batches["softmax", 2][0])


# what is reckoned


def state_of(loss, **keys):
    values = {"step": 300, "loss": loss, "validation_loss": loss, "is_exported": True}
    return State(**values | {"seconds_per_step": None} | keys)


def test_losses_of_several_rates_and_seeds(write):
    file = write(
        ("[2e-3]", "[1e-3, 2e-3, 4e-3]"), ("[1, 2]", "[1, 2, 3]"), ("seeds = [1]", "seeds = [2, 3]")
    )
    found = read_sweep(file)
    losses = {
        ("softmax", 1e-3): [2.0, 2.2, 2.4],
        ("softmax", 2e-3): [2.1, 2.1, 2.1],
        # the lowest, but not whole
        ("softmax", 4e-3): [1.0, 1.0, None],
        ("softpick", 1e-3): [2.5, 2.7],
        ("softpick", 2e-3): [2.6, 2.8],
        ("softpick", 4e-3): [2.3, 2.7],
    }
    states = {}
    for run in found.runs:
        seeds = next(arm.seeds for arm in found.arms if arm.name == run.arm)
        loss = losses[run.arm, run.learning_rate][seeds.index(run.seed)]
        states[run.name] = state_of(loss, is_exported=loss is not None)
    best = best_runs(found, states)
    assert {arm: runs[0].learning_rate for arm, runs in best.items()} == {
        "softmax": 2e-3,
        "softpick": 4e-3,
    }
    table = loss_table(found, states)
    assert "| softmax | 0.002 | 3 | 2.1000 | 0.0000 | – | – |" in table
    # gaps by seed: 0.2 and 0.6
    assert "| softpick | 0.004 | 2 | 2.5000 | 0.2828 | +0.4000 | 0.2828 |" in table
    assert "| softmax | 0.004 | 2 of 3 | 1.0000 | 0.0000 |" in table


def test_the_minimum_of_a_parabola_is_found_between_the_rates():
    def loss(rate):
        return 3.0 + 0.2 * math.log(rate / 1.7e-3) ** 2

    losses = {rate: loss(rate) for rate in (4e-3, 5e-4, 1e-3, 2e-3, 2.5e-4)}
    assert fitted_minimum(losses) == pytest.approx((1.7e-3, 3.0))
    # neither neighbour of the lowest may be missing or without a loss
    assert fitted_minimum({1e-3: 3.0, 2e-3: 3.1, 4e-3: 3.2}) is None
    assert fitted_minimum({1e-3: 3.2, 2e-3: 3.1, 4e-3: 3.0}) is None
    assert fitted_minimum({1e-3: 3.2, 2e-3: 3.1, 4e-3: math.inf}) is None
    assert fitted_minimum({1e-3: 3.0, 2e-3: 3.0, 4e-3: 3.0}) is None
    assert fitted_minimum({1e-3: 3.1, 2e-3: 3.0, 4e-3: 3.1}) == pytest.approx((2e-3, 3.0))


def test_the_losses_name_the_minimum_of_arms_with_three_rates(write):
    found = read_sweep(write(("[2e-3]", "[1e-3, 2e-3, 4e-3]"), ("[1, 2]", "[1]")))
    losses = {
        "softmax": {1e-3: 3.1, 2e-3: 3.0, 4e-3: 3.1},
        "softpick": {1e-3: 3.3, 2e-3: 3.1, 4e-3: 3.3},
    }
    states = {
        run.name: state_of(losses[run.arm][run.learning_rate], is_exported=True)
        for run in found.runs
    }
    table = loss_table(found, states)
    assert "| softmax | 0.002 | 3.0000 | – |\n| softpick | 0.002 | 3.1000 | +0.1000 |" in table
    losses["softpick"][4e-3] = 3.0
    states |= {
        run.name: state_of(3.0, is_exported=True)
        for run in found.runs
        if (run.arm, run.learning_rate) == ("softpick", 4e-3)
    }
    whole = "| softpick | none: the lowest loss is at the end of the range | | |"
    assert whole in loss_table(found, states)
    unfinished = next(run for run in found.runs if run.arm == "softpick")
    states[unfinished.name] = state_of(None, step=0, is_exported=False)
    assert whole not in loss_table(found, states)


def test_the_report_is_asked_to_compare_with_softmax(write):
    flipped = [("[arms.softmax]", "[arms.x]"), ("[arms.softpick]", "[arms.softmax]")]
    for changes, labels in (
        ([], ["softmax", "softmax", "softpick"]),
        (flipped, ["softmax", "x", "x"]),
        (flipped[:1], ["x", "x", "softpick"]),
    ):
        found = read_sweep(write(*changes))
        args = flags.parser().parse_args(analysis_flags(found, list(found.runs)))
        assert args.label == labels
        assert [path.parent.parent.name for path in args.model] == labels
        assert [path.parent.name for path in args.run] == labels
    # training.seq_len is 32
    assert check._analysis(found).lengths == [16, 32]


def test_cost(write, monkeypatch):
    found = read_sweep(write())
    states = {run.name: state_of(None, step=0, is_exported=False) for run in found.runs}
    parameters = {"softmax": 10**6, "softpick": 10**6}

    def cost(slots=1, speed=None):
        flops = {"softmax": 10, "softpick": 20}
        known = {"sequences": 4, "slots": slots, "tokens_per_second": speed}
        return estimate(found, states, parameters, flops, **known)

    text = "\n".join(cost(speed=1.0).lines)
    tokens = 300 * 4 * 32
    assert f"{tokens:,} per run (300 steps of 4 x 32), {3 * tokens:,} in all" in text
    assert f"FLOPs   {tokens * (10 + 10 + 20):.2e} in all" in text
    assert f"{3 * tokens / 3600:.2f} hours of training to come at 1 tokens/s per run" in text
    # two at a time: the third starts when the first has ended
    assert f"{2 * tokens / 3600:.2f} hours" in "\n".join(cost(slots=2, speed=1.0).lines)
    assert "unknown until the first run has finished" in "\n".join(cost().lines)
    # a run leaves 2 checkpoints and an export, and one more checkpoint is written at a time
    assert f"{(3 * (2 * 12 + 4) + 12) * 10**6 / 2**30:.2f} GiB to come" in text
    require_disk(found, cost())
    states[found.runs[0].name] = state_of(2.0, seconds_per_step=64.0)
    text = "\n".join(cost().lines)
    assert "at 2 tokens/s per run, as measured in 1 finished runs" in text
    assert f"{2 * tokens / 2 / 3600:.2f} hours" in text
    parameters["softpick"] = 10**15
    with pytest.raises(UsageError, match="GiB more than its disk has free"):
        require_disk(found, cost())


def test_the_speed_of_a_run_leaves_out_its_pauses(write):
    run = read_sweep(write()).runs[0]
    (run.folder / "record").mkdir(parents=True)
    for number, start in ((1, 90), (2, 500)):
        when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(start))
        (run.folder / f"record/{number:03}.json").write_text(json.dumps({"start": when}))
    lines = [{"step": s, "time": t, "loss": 3.0} for s, t in ((1, 100), (11, 120), (21, 600))]
    lines += [{"step": 31, "time": 640, "loss": 2.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text + '{"step": 41, "ti')
    state = read_state(run)
    assert (state.step, state.loss, state.is_finished) == (31, 2.5, False)
    assert state.seconds_per_step == pytest.approx((20 + 40) / 20)
    assert read_state(run, since=550).seconds_per_step == pytest.approx(4)
