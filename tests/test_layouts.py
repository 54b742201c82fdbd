"""Every layout trains as one process does: losses and gradient norms to 5 digits over 10 steps.

All layouts of a number of processes share one start of those processes (`layout_runs.py`).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_runs import run_program
from layout_runs import curves_of
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import curve
from transformers import AutoModelForCausalLM

from flame.base.errors import UsageError
from flame.config.parse import parse_args
from flame.models import read_config
from flame.run.check_layout import check_layout
from flame.titan.mesh import Layout
from flame.titan.model import ModelArgs, TitanModel
from flame.titan.parallelize import parallelize

ROOT = Path(__file__).parent.parent
SEQUENCES = 4

DDP = "--training.data_parallel_replicate_degree 2"
TP = "--training.tensor_parallel_degree 2"
CP = "--experimental.context_parallel_degree 2"
OP = "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op"
FULL = "--activation_checkpoint.mode full"
BF16 = "--training.mixed_precision_param bfloat16"

# name -> processes that see different sequences, micro-batches in a step, flags
ONE = {
    "one process": (1, 1, ""),
    "one process, full, accumulated": (1, 4, FULL),
    "one process, op, deterministic": (1, 1, f"{OP} --training.deterministic --training.gc_freq 3"),
    "one process, bf16": (1, 1, BF16),
}
TWO = {
    "FSDP, always, full, accumulated": (
        2,
        2,
        f"--training.fsdp_reshard_after_forward always {FULL}",
    ),
    "FSDP, never, op": (2, 1, f"--training.fsdp_reshard_after_forward never {OP}"),
    "DDP": (2, 1, DDP),
    "DDP, accumulated": (2, 2, DDP),
    "TP": (1, 1, TP),
    "TP, whole logits, accumulated": (1, 2, f"{TP} --training.disable_loss_parallel"),
    "CP": (1, 1, CP),
    "CP, every second layer, accumulated": (1, 2, f"{CP} --activation_checkpoint.mode selective"),
}
FOUR = {
    "FSDP x 4": (4, 1, ""),
    "HSDP 2 x 2": (4, 1, DDP),
    "FSDP 2 x TP 2": (2, 1, TP),
    "DDP 2 x TP 2": (2, 1, f"{DDP} {TP}"),
    "FSDP 2 x CP 2": (2, 1, CP),
    "DDP 2 x CP 2": (2, 1, f"{DDP} {CP}"),
    "CP 2 x TP 2": (1, 1, f"{CP} {TP}"),
}
# the second time from the cache of the first, which all processes share
COMPILED = {
    "TP, op, compiled": (1, 1, f"{TP} {OP} --training.compile"),
    "TP, op, compiled again": (1, 1, f"{TP} {OP} --training.compile"),
}
# the head is the embedding
TIED = {"FSDP 2 x TP 2, tied": (2, 1, TP)}
# NOTE(numerics): softmax, whose gradient bfloat16 can hold: softpick's is divided by the sum of |e^s - 1|,
# which is next to nothing in the first rows of an untrained model, so that it follows the last bit of s
HALF = {"FSDP, bf16": (2, 1, BF16), "DDP, bf16": (2, 1, f"{DDP} {BF16}")}
HALF |= {"TP, bf16": (1, 1, f"{TP} {BF16}"), "CP, bf16": (1, 1, f"{CP} {BF16}")}

SPREAD = {"FSDP of softpick, bf16": (2, 1, BF16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of 2 layers with 4 heads on 2 key heads, their text, and the flags of a run of 10 steps."""
    folder = tmp_path_factory.mktemp("layouts")
    raw = json.loads((ROOT / "configs" / "softpick_transformer_tiny.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    raw["num_key_value_heads"] = 2
    for name, changes in {
        "model": {},
        "tied": {"tie_word_embeddings": True},
        "shallow": {"num_hidden_layers": 1},
        "softmax": {"attn_impl": "naive_softmax_attn"},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(raw | changes))
    lines = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}.\n" for i in range(600))
    (folder / "text.txt").write_text("".join(lines))
    return folder


def flags(folder, *, model="model"):
    argv = f"--model.config {folder}/{model}.json --training.dataset {folder}/text.txt"
    argv += f" --job.dump_folder {folder}/run --training.seq_len 32 --training.steps 10"
    return f"{argv} --lr_scheduler.warmup_steps 2 --metrics.log_freq 1"


def curves(folder, processes, groups):
    """Name -> loss and gradient norm of every step, for ``{model: {name: (ranks, batches, flags)}}``."""
    runs = []
    for model, layouts in groups.items():
        for name, (ranks, batches, argv) in layouts.items():
            size = f"--training.batch_size {SEQUENCES // ranks // batches}"
            size += f" --training.gradient_accumulation_steps {batches}"
            runs.append((name, f"{flags(folder, model=model)} {size} {argv}".split()))
    return curves_of(runs, folder, processes)


@pytest.fixture(scope="module")
def two(folder):
    softmax = {"one process, softmax": (1, 1, "")} | HALF
    shallow = {"one process, shallow": (1, 1, "")} | COMPILED
    return curves(folder, 2, {"model": ONE | TWO | SPREAD, "softmax": softmax, "shallow": shallow})


@pytest.fixture(scope="module")
def four(folder):
    return curves(folder, 4, {"model": FOUR, "tied": {"one process, tied": (1, 1, "")} | TIED})


BRIEF = ("FSDP, never, op", "TP", "CP")


@pytest.fixture(scope="module")
def brief(folder):
    return curves(
        folder, 2, {"model": {"one process": ONE["one process"]} | {x: TWO[x] for x in BRIEF}}
    )


@pytest.mark.parametrize("name", BRIEF)
def test_two_processes_train_as_one_does(brief, name):
    assert_equal(brief[name], brief["one process"], 1e-5)


def assert_equal(got, expected, digits):
    # 10 steps, then the validation loss
    assert len(got) == len(expected) == 11
    for step, (a, b) in enumerate(zip(got, expected, strict=True), 1):
        assert a == pytest.approx(b, rel=digits), f"loss and gradient norm of step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_of_one_and_two_processes(two, name):
    rel = 2**-8 if "bf16" in name else 1e-5
    expected = two["one process"]
    assert expected[-1][0] < expected[0][0] - 0.5
    if "bf16" in name:
        # the loss alone, for the reason above `HALF`
        assert_equal([x[:1] for x in two[name]], [x[:1] for x in expected], rel)
        assert two[name] != expected
    else:
        assert_equal(two[name], expected, rel)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(two, name):
    # fused operations round otherwise: half a unit of the fifth digit
    assert_equal(two[name], two["one process, shallow"], 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_half_precision(two, name):
    # weights and activations are rounded to 8 bits: losses and norms agree to one unit of those
    assert_equal(two[name], two["one process, softmax"], 2**-8)
    assert two[name] != two["one process, softmax"]


@pytest.mark.slow
def test_several_processes_round_as_one_does(two):
    # while the norms' weights are 1; in the gradients of softpick any other rounding would show
    [name] = SPREAD
    (loss, norm), (expected_loss, expected_norm) = two[name][0], two["one process, bf16"][0]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_of_four_processes(two, four, name):
    assert_equal(four[name], two["one process"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(four, name):
    assert_equal(four[name], four["one process, tied"], 1e-5)


def train(folder, processes, argv):
    run_program("flame.train", f"{flags(folder)} {argv}".split(), processes=processes)
    return {name: curve(folder / "run", name) for name in ("loss", "grad_norm")}


@pytest.mark.slow
def test_a_run_continues_in_another_layout_and_is_exported(folder, two):
    """10 steps under TP with "op", the last 5 of them once more under CP."""
    argv = f"--training.batch_size {SEQUENCES} --checkpoint.interval 5 --sample.max_new_tokens 1"
    got = train(folder, 2, f"{argv} {TP} {OP}")
    checkpoints = folder / "run" / "checkpoint"
    names = dcp.FileSystemReader(checkpoints / "step-5").read_metadata().state_dict_metadata
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if "_checkpoint_wrapped" in name]
    for path in (checkpoints / "step-10", folder / "run" / "tb", folder / "run" / "hf"):
        shutil.rmtree(path)
    again = train(folder, 2, f"{argv} {CP}")
    assert list(again["loss"]) == [6, 7, 8, 9, 10]
    for i, name in enumerate(("loss", "grad_norm")):
        for curves in (got, again):
            for step, value in curves[name].items():
                assert value == pytest.approx(two["one process"][step - 1][i], rel=1e-5), step
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf")
    trained = dcp_to_hf_state(checkpoints / "step-10")
    for name, x in model.state_dict().items():
        assert torch.equal(x, trained[name]), name


def dcp_to_hf_state(checkpoint):
    """The parameters of a checkpoint, by the names that the exported model has."""
    state = {
        name: torch.empty(x.size)
        for name, x in dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
        if name.endswith("weight") and not name.startswith(("optimizer", "lr_scheduler"))
    }
    dcp.load(state, checkpoint_id=str(checkpoint), no_dist=True)
    return state


@pytest.mark.parametrize(
    ("argv", "calls"), [("", 1), (OP, 1), (FULL, 2)], ids=["none", "op", "full"]
)
def test_attention_kernel_is_not_run_again_under_op(device, argv, calls):
    config = parse_args(f"--training.seq_len 16 {argv}".split())
    model_config = read_config("configs/softpick_transformer_tiny.json")
    model_config.attn_impl = "parallel_softpick_attn"
    model_config.num_hidden_layers = model_config.num_attention_heads = 1
    model_config.num_key_value_heads, model_config.head_dim = 1, 16
    with torch.device("meta"):
        model = TitanModel(ModelArgs(model_config, seed=1))
    degrees = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
    parallelize(model, Layout(**degrees, world_size=1), config)
    model.to_empty(device=device)
    model.init_weights()
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    with Count():
        model(torch.arange(16, device=device)[None]).sum().backward()
    assert seen.count(torch.ops.softpick.normalized_attn_fwd.default) == calls
    assert seen.count(torch.ops.softpick.normalized_attn_bwd.default) == 1


def test_buffers_of_offloaded_weights_are_on_the_device():
    model_config = read_config("configs/softpick_transformer_tiny.json")
    with torch.device("meta"):
        model = TitanModel(ModelArgs(model_config, seed=1))
    model.to_empty(device="cpu")
    model.init_weights(buffer_device=torch.device("meta"))
    assert {x.device.type for x in model.buffers()} == {"meta"}
    assert {x.device.type for x in model.parameters()} == {"cpu"}


def check(argv, *, processes, device_type="cpu", **changes):
    config = parse_args(argv.split())
    model = read_config("configs/softpick_transformer_tiny.json")
    for name, value in changes.items():
        setattr(model, name, value)
    check_layout(config, model, num_processes=processes, device_type=device_type)


@pytest.mark.parametrize(
    ("argv", "processes", "changes", "message"),
    [
        (
            f"{TP} {CP} --training.data_parallel_shard_degree 2",
            4,
            {},
            "--training.data_parallel_shard_degree 2, --training.tensor_parallel_degree 2 and "
            "--experimental.context_parallel_degree 2 must multiply to the number of processes, 4",
        ),
        (TP, 3, {}, "must multiply to the number of processes, 3"),
        (
            TP,
            2,
            {"num_key_value_heads": 1},
            "--training.tensor_parallel_degree 2 must divide num_key_value_heads 1",
        ),
        (
            TP,
            2,
            {"num_attention_heads": 3},
            "--training.tensor_parallel_degree 2 must divide num_attention_heads 3",
        ),
        (TP, 2, {"intermediate_size": 345}, "must divide intermediate_size 345"),
        (f"{CP} --training.seq_len 130", 2, {}, "--training.seq_len 130 must be a multiple of 4"),
        (f"{TP} --training.seq_len 129", 2, {}, "--training.seq_len 129 must be a multiple of 2"),
        ("--training.disable_loss_parallel", 2, {}, "--training.tensor_parallel_degree above 1"),
        (
            "--training.fsdp_reshard_after_forward never",
            1,
            {},
            "never has no effect in one process",
        ),
        ("--training.enable_cpu_offload", 2, {}, "--training.enable_cpu_offload needs several"),
        (
            "--training.enable_cpu_offload",
            1,
            {"device_type": "cuda"},
            "needs several processes (NGPU) with a GPU each, got 1 on cuda",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(argv, processes, changes, message):
    with pytest.raises(UsageError) as error:
        check(argv, processes=processes, **changes)
    assert message in str(error.value)


def test_layouts_that_fit():
    check("", processes=1)
    check(f"{TP} {CP} {DDP}", processes=8)
    check("--training.enable_cpu_offload", processes=2, device_type="cuda")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--experimental.pipeline_parallel_degree 2",
            "--experimental.pipeline_parallel_degree is not supported: leave it out; shard with",
        ),
        ("--experimental.context_parallel_rotate_method alltoall", "not supported: leave it out"),
        ("--experimental.context_parallel_degree 0", "must be at least 1, got 0"),
        ("--experimental.enable_async_tensor_parallel", "not supported: leave it out"),
        ("--experimental.enable_compiled_autograd", "not supported: leave it out"),
        ("--training.tensor_parallel_degree 0", "must be at least 1, got 0"),
        ("--training.gc_freq 0", "must be at least 1, got 0"),
        ("--activation_checkpoint.mode some", "some"),
        (
            "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option 0",
            'must be a number of layers, at least 1, or "op", got',
        ),
        (
            "--activation_checkpoint.selective_ac_option op",
            "must be left out under --activation_checkpoint.mode none",
        ),
    ],
)
def test_a_flag_that_is_not_possible_is_refused_by_name(argv, message):
    with pytest.raises(UsageError) as error:
        parse_args(argv.split())
    assert message in str(error.value)
    assert argv.split()[-2 if " " in argv else -1] in str(error.value)
