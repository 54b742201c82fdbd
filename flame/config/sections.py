"""Every flag of the trainer: its name, meaning, default and check, and nowhere else.

Flags are dotted, ``--training.steps 300``; the same names in sections make the TOML file that
``--job.config_file`` reads. A flag wins over the file, the file over the defaults below, which are the
ones of the smallest useful run: a 1M parameter model on the text that ships with Python.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flame.base.errors import UsageError
from flame.base.paths import expand, split_list


def _require(condition: bool, flag: str, value: object, expected: str) -> None:
    """Raises UsageError unless ``condition`` holds; ``expected`` completes "must be"."""
    if not condition:
        raise UsageError(f"--{flag} must be {expected}, got {value!r}")


# fixed names inside a dump folder; folder flags may not use them
_RESERVED_NAMES = (
    "hf",
    "record",
    "spikes",
    "comm_traces",
    "wandb",
    "wandb_id",
    "lock",
    "run.json",
    "config.toml",
    "metrics.jsonl",
)


def _require_name(flag: str, value: str) -> None:
    is_name = Path(value).name == value and value not in ("", "..", *_RESERVED_NAMES)
    expected = (
        f"the name of a folder within the dump folder, and none of {', '.join(_RESERVED_NAMES)}"
    )
    _require(is_name, flag, value, expected)


@dataclass(kw_only=True, slots=True)
class Job:
    """``--job.*``: where the run writes, its recipe file and description, and which GPUs it may take."""

    config_file: str | None = None
    """TOML file with the flags of a run; flags on the command line win over it."""
    dump_folder: str | None = None
    """Folder of this run: checkpoints, TensorBoard, the exported model. One run per folder; repeating the
    command continues the run. Default: exp/<name of the model config>."""
    allow_cross_numa: bool = False
    """Lets a run take GPUs of several NUMA groups, more than 4 of a machine, and several partitions of one GPU;
    each process is still bound to the group of its GPU. If the groups cannot be read, the run is neither checked nor bound."""
    description: str = ""
    """A sentence about the run: printed at its start, kept in its record, and the notes of the run in wandb."""
    print_args: bool = False
    """Print all flags, as the TOML that --job.config_file reads, at the start."""

    def __post_init__(self) -> None:
        _require(self.dump_folder != "", "job.dump_folder", self.dump_folder, "a folder")
        if self.dump_folder is not None:
            self.dump_folder = expand("--job.dump_folder", self.dump_folder)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """``--model.*``: what is trained, and the tokenizer that makes its ids."""

    config: str = "configs/softpick_transformer_tiny.json"
    """Model configuration: a JSON file in Hugging Face style, model_type softpick_transformer."""
    tokenizer_path: str = "byte"
    """Hugging Face tokenizer (folder or hub name), or the built-in "byte" (256 bytes, bos, eos, pad)."""

    def __post_init__(self) -> None:
        self.config = expand("--model.config", self.config)


@dataclass(kw_only=True, slots=True)
class Optimizer:
    """``--optimizer.*``: one rate and one weight decay for all parameters."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Optimizer."""
    lr: float = 3e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-15
    """Term added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every parameter."""
    implementation: Literal["for-loop", "foreach", "fused"] = "fused"
    """How torch carries out a step."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", self.lr, "positive")
        for name in ("beta1", "beta2"):
            beta = getattr(self, name)
            _require(0 <= beta < 1, f"optimizer.{name}", beta, "at least 0 and below 1")
        _require(self.eps >= 0, "optimizer.eps", self.eps, "at least 0")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")


@dataclass(kw_only=True, slots=True)
class LRScheduler:
    """``--lr_scheduler.*``: the learning rate of each step as a share of ``optimizer.lr``: warm-up, constant, decay."""

    warmup_steps: int = 30
    """Steps in which the learning rate rises linearly from 0."""
    decay_ratio: float | None = None
    """Share of the steps, at the end, in which the rate decays (warmup-stable-decay). Default: it decays
    from the end of the warm-up."""
    decay_type: Literal["linear", "sqrt", "cosine"] = "cosine"
    """Shape of the decay."""
    lr_min: float = 0.1
    """Rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        _require(
            self.warmup_steps >= 0, "lr_scheduler.warmup_steps", self.warmup_steps, "at least 0"
        )
        _require(
            self.decay_ratio is None or 0 < self.decay_ratio <= 1,
            "lr_scheduler.decay_ratio",
            self.decay_ratio,
            "above 0 and at most 1",
        )
        _require(0 <= self.lr_min <= 1, "lr_scheduler.lr_min", self.lr_min, "between 0 and 1")


# data_probs is a multiple of 1 / SHARE_UNITS, so that a share is exact in every block of this many sequences
SHARE_UNITS = 10_000


@dataclass(frozen=True, slots=True)
class DataSource:
    """One source of ``--training.dataset``; the fields are the flags' values for it."""

    dataset: str
    name: str | None
    split: str
    data_dir: str | None
    data_files: str | None
    share: int
    """Sequences of this source in every `SHARE_UNITS` of the run."""


DEFAULT_BOS = "tokenizer"


@dataclass(kw_only=True, slots=True)
class Training:
    """``--training.*``: data, batch and length of a run, numerics, and the layout of its processes."""

    dataset: str = "python-docs"
    """Text to train on, one source or several separated by commas (an existing path keeps the commas in its
    name): a file or folder (txt, md, jsonl, json, also compressed; parquet, arrow), a folder written by
    flame.data.prepare or by save_to_disk of datasets, a Hugging Face dataset name, or the built-in
    "python-docs", Python's language reference as it ships with every interpreter."""
    dataset_name: str | None = None
    """Configuration of a Hugging Face dataset, or of a folder with a dataset card. With several sources it has
    one value each, separated by commas, and an empty one for a source that takes none. dataset_split,
    data_dir and data_files are given in the same way."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset, or of a folder that has splits. For a folder, several splits are joined
    by + and "all" means every file."""
    data_dir: str | None = None
    """Folder within a Hugging Face dataset."""
    data_files: str | None = None
    """Files within a Hugging Face dataset, or a glob pattern within a local folder."""
    data_probs: str | None = None
    """Share of each source among the sequences, separated by commas, summing to 1, in steps of 0.0001.
    Needed with several sources."""
    streaming: bool = False
    """Read documents in their order while training, without reading all of the data first and without
    shuffling; needs --validation.share 0."""
    num_workers: int = 0
    """Extra processes for each training process that tokenize (streaming) or read sequences; 0: none."""
    prefetch_factor: int | None = None
    """What each worker prepares ahead: batches, or with streaming pieces of 65,536 characters. Default: 2."""
    bos: Literal["tokenizer", "sequence", "none"] | None = None
    """How documents begin: with what the tokenizer itself adds, its bos where it has one; with bos at the start of
    every sequence, and with varlen of every document; or with nothing. Default: tokenizer, or what the run in the
    dump folder began with."""
    varlen: bool = False
    """A token attends to its own document only: sequences are packed from documents whose positions start at
    0, and their bounds reach the attention operator as cu_seqlens."""
    context_len: int | None = None
    """With varlen, the longest piece of a document that attends to itself. Default: seq_len."""
    batch_size: int = 16
    """Sequences in a micro-batch of one process."""
    seq_len: int = 128
    """Tokens in a sequence."""
    gradient_accumulation_steps: int = 1
    """Micro-batches over which each process sums gradients before a step."""
    steps: int = 300
    """Optimizer steps."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    skip_nan_inf: bool = False
    """Skip the optimizer's step when the loss or the gradient norm is NaN or infinite. Without it, such a
    step ends the run."""
    max_skipped_steps: int = 10
    """With skip_nan_inf: skipped steps in a row after which the run ends."""
    seed: int = 42
    """Seed of weights and data order."""
    loss: Literal["cross_entropy", "fla_linear_cross_entropy"] = "cross_entropy"
    """Cross-entropy from the logits of a micro-batch, or a piece of them at a time (a kernel of
    flash-linear-attention, on a GPU): the same function, less memory, a little slower."""
    compile: bool = False
    """Compile every layer and the loss with torch.compile."""
    mixed_precision_param: Literal["bfloat16", "float32"] | None = None
    """Dtype of weights and activations in forward and backward; master weights, the sums of gradients over
    processes and the optimizer stay in float32. Default: bfloat16 on a GPU, float32 on a CPU."""
    data_parallel_replicate_degree: int = 1
    """Copies of the model (DDP; with data_parallel_shard_degree above 1, HSDP)."""
    data_parallel_shard_degree: int = -1
    """Processes that one copy of the model is sharded over (FSDP2); -1: all that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether gathered weights are freed between forward and backward. Default: those of the layers are,
    those of embedding, last norm and head are not."""
    enable_cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in host memory (several processes, on GPUs)."""
    tensor_parallel_degree: int = 1
    """Processes that share every layer, by heads and width, and the vocabulary; between layers they share the
    sequence."""
    disable_loss_parallel: bool = False
    """Under tensor parallelism gather the logits of the whole vocabulary before the loss."""
    deterministic: bool = False
    """Allow only deterministic algorithms of torch, which are slower."""
    gc_freq: int = 50
    """Steps between two runs of Python's garbage collector."""

    def __post_init__(self) -> None:
        self.sources()
        _require(self.num_workers >= 0, "training.num_workers", self.num_workers, "at least 0")
        _require(
            self.prefetch_factor is None or (self.prefetch_factor >= 1 and self.num_workers >= 1),
            "training.prefetch_factor",
            self.prefetch_factor,
            "at least 1 and goes with --training.num_workers",
        )
        _require(
            self.context_len is None or (self.varlen and 1 <= self.context_len <= self.seq_len),
            "training.context_len",
            self.context_len,
            f"between 1 and --training.seq_len {self.seq_len} and goes with --training.varlen",
        )
        for name in (
            "batch_size",
            "seq_len",
            "gradient_accumulation_steps",
            "steps",
            "tensor_parallel_degree",
            "gc_freq",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"training.{name}", value, "at least 1")
        if self.bos == "sequence":
            expected = "at least 2 with --training.bos sequence, whose sequences start with bos"
            _require(self.seq_len >= 2, "training.seq_len", self.seq_len, expected)
        _require(self.max_norm > 0, "training.max_norm", self.max_norm, "positive")
        _require(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2^63")
        name = "training.max_skipped_steps"
        _require(self.max_skipped_steps >= 1, name, self.max_skipped_steps, "at least 1")
        replicate, shard = self.data_parallel_replicate_degree, self.data_parallel_shard_degree
        name = "training.data_parallel_replicate_degree"
        _require(replicate >= 1, name, replicate, "at least 1")
        name = "training.data_parallel_shard_degree"
        _require(shard == -1 or shard >= 1, name, shard, "-1 or at least 1")

    def sources(self) -> list[DataSource]:
        """The sources of ``dataset``, each with its values of the other flags.

        Raises:
            UsageError: A flag has not one value for each source, or ``data_probs`` are not valid shares.
        """
        datasets = split_list(self.dataset)
        columns = {}
        for name in ("dataset_name", "dataset_split", "data_dir", "data_files"):
            value = getattr(self, name)
            if value is None or name == "dataset_split" and value == "train":
                columns[name] = [value] * len(datasets)
                continue
            # with one source a comma is part of the value
            values = [value] if len(datasets) == 1 else value.split(",")
            expected = (
                f"{len(datasets)} values separated by commas, one for each of --training.dataset"
            )
            _require(len(values) == len(datasets), f"training.{name}", value, expected)
            default = "train" if name == "dataset_split" else None
            columns[name] = [entry or default for entry in values]
        shares = self._shares(len(datasets))
        return [
            DataSource(dataset, *values)
            for dataset, *values in zip(datasets, *columns.values(), shares, strict=True)
        ]

    def _shares(self, count: int) -> list[int]:
        if self.data_probs is None and count == 1:
            return [SHARE_UNITS]
        expected = (
            f"{count} numbers, one for each of --training.dataset, separated by commas, each a positive "
            "multiple of 0.0001, that sum to 1"
        )
        try:
            exact = [float(share) * SHARE_UNITS for share in (self.data_probs or "").split(",")]
            shares = [round(share) for share in exact]
        except (ValueError, OverflowError):
            exact = shares = []
        _require(
            len(shares) == count
            and min(shares) >= 1
            and sum(shares) == SHARE_UNITS
            and all(abs(x - share) < 1e-6 for x, share in zip(exact, shares, strict=True)),
            "training.data_probs",
            self.data_probs,
            expected,
        )
        return shares


@dataclass(kw_only=True, slots=True)
class ActivationCheckpoint:
    """``--activation_checkpoint.*``: memory of activations against time in the backward pass."""

    mode: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in the backward pass instead of keeping them: of every layer (full), or
    those that selective_ac_option picks."""
    selective_ac_option: str = "2"
    """A number n: of every n-th layer; "op": of every layer all but attention, every second matrix product
    and what was reduced over processes."""

    def __post_init__(self) -> None:
        option, name = self.selective_ac_option, "activation_checkpoint.selective_ac_option"
        is_number = option.isdecimal() and int(option) >= 1
        _require(
            is_number or option == "op", name, option, 'a number of layers, at least 1, or "op"'
        )
        _require(
            self.mode == "selective" or option == "2",
            name,
            option,
            f"left out under --activation_checkpoint.mode {self.mode}",
        )


@dataclass(kw_only=True, slots=True)
class Experimental:
    """``--experimental.*``: context parallelism, in the section that upstream flame has for it."""

    context_parallel_degree: int = 1
    """Processes that share each sequence; every one needs the keys and values of all of it."""

    def __post_init__(self) -> None:
        degree = self.context_parallel_degree
        _require(degree >= 1, "experimental.context_parallel_degree", degree, "at least 1")


@dataclass(kw_only=True, slots=True)
class Validation:
    """``--validation.*``: which data is held out, and when its loss is measured."""

    share: float = 0.05
    """Share of the tokens, the last ones, that is held out; 0: no validation."""
    sequences: int = 0
    """With training.streaming, instead of share: number of sequences held out of each source, from its
    first documents."""
    freq: int = 100
    """Steps between two measurements of the validation loss; the last step is always measured."""

    def __post_init__(self) -> None:
        _require(0 <= self.share < 1, "validation.share", self.share, "at least 0 and below 1")
        _require(self.sequences >= 0, "validation.sequences", self.sequences, "at least 0")
        _require(self.freq >= 1, "validation.freq", self.freq, "at least 1")


# what a checkpoint holds besides the weights
_LOADED = ("optimizer", "lr_scheduler", "dataloader", "train_state", "rng")


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """``--checkpoint.*``: what is saved and when, what a run starts from, and what it exports."""

    enable_checkpoint: bool = True
    """Save checkpoints, without which a run can neither continue nor be exported."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, within the dump folder."""
    interval: int = 100
    """Steps between two checkpoints; the last step is always saved."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async"
    """How the checkpoints before the last are saved: "async" copies the state to the host and writes it
    while the training goes on; "async_with_pinned_mem" keeps the copy, in pinned memory, which makes
    copying from a GPU faster; "disabled" writes while the training waits. A kill loses the steps since the
    last complete checkpoint: with "disabled" at most an interval, else also those done while one is written."""
    keep_latest_k: int = 2
    """Checkpoints to keep, the last one included; 0: all."""
    load_step: int = -1
    """Step to continue from, which must be the newest; -1: the newest."""
    initial_load_path: str | None = None
    """Checkpoint to start from, a folder step-N of any run or what flame.convert hf-to-dcp wrote. A run
    that has a checkpoint of its own continues from that."""
    initial_load_model_weights_only: bool = True
    """Take the weights of initial_load_path alone; otherwise also optimizer, schedule, step, position in
    the data and random state."""
    exclude_from_loading: str = ""
    """What not to take from initial_load_path, with no_initial_load_model_weights_only: some of
    optimizer, lr_scheduler, dataloader, train_state, rng, separated by commas."""
    last_save_model_weights_only: bool = False
    """Save only the weights after the last step, in export_dtype; such a run cannot be continued with more
    steps."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of exported models, and of a last checkpoint that holds the weights alone."""
    convert_to_hf_on_save: bool = False
    """Export every checkpoint to the folder hf in it. The last one is always exported to hf in the dump
    folder."""
    create_seed_checkpoint: bool = False
    """Save the initial weights as step-0 and end: a checkpoint that several runs start from with
    initial_load_path. Takes one process."""

    def excluded(self) -> list[str]:
        """`exclude_from_loading` as a list."""
        return [name.strip() for name in self.exclude_from_loading.split(",") if name.strip()]

    def __post_init__(self) -> None:
        _require_name("checkpoint.folder", self.folder)
        _require(self.interval >= 1, "checkpoint.interval", self.interval, "at least 1")
        _require(self.load_step >= -1, "checkpoint.load_step", self.load_step, "-1 or a step")
        _require(
            self.keep_latest_k >= 0, "checkpoint.keep_latest_k", self.keep_latest_k, "at least 0"
        )
        name = "checkpoint.initial_load_path"
        _require(self.initial_load_path != "", name, self.initial_load_path, "a folder")
        if self.initial_load_path is not None:
            self.initial_load_path = expand(f"--{name}", self.initial_load_path)
        _require(
            set(self.excluded()) <= set(_LOADED),
            "checkpoint.exclude_from_loading",
            self.exclude_from_loading,
            f"some of {', '.join(_LOADED)}, separated by commas",
        )
        _require(
            not self.excluded()
            or (self.initial_load_path is not None and not self.initial_load_model_weights_only),
            "checkpoint.exclude_from_loading",
            self.exclude_from_loading,
            "used with --checkpoint.initial_load_path and "
            "--checkpoint.no_initial_load_model_weights_only",
        )
        _require(
            "train_state" not in self.excluded() or "lr_scheduler" in self.excluded(),
            "checkpoint.exclude_from_loading",
            self.exclude_from_loading,
            "given lr_scheduler together with train_state, since both count the steps",
        )
        for name in (
            "create_seed_checkpoint",
            "convert_to_hf_on_save",
            "last_save_model_weights_only",
        ):
            _require(
                self.enable_checkpoint or not getattr(self, name),
                f"checkpoint.{name}",
                True,
                "left out with --checkpoint.no_enable_checkpoint",
            )
        _require(
            self.enable_checkpoint or self.initial_load_path is None,
            "checkpoint.initial_load_path",
            self.initial_load_path,
            "left out with --checkpoint.no_enable_checkpoint",
        )


@dataclass(kw_only=True, slots=True)
class MetricsConfig:
    """``--metrics.*``: what is logged, how often, and where to; what counts as a spike of the loss."""

    log_freq: int = 10
    """Steps between two lines of the log, of metrics.jsonl and of TensorBoard; the first step is always
    logged."""
    enable_tensorboard: bool = True
    """Write TensorBoard files."""
    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, within the dump folder."""
    enable_wandb: bool = False
    """Also log to Weights & Biases; project, name and id by WANDB_PROJECT (default: flame), WANDB_NAME and
    WANDB_RUN_ID (default: the dump folder's)."""
    save_for_all_ranks: bool = False
    """Every process writes its own metrics.rankN.jsonl and TensorBoard folder; without this flag only the
    first process writes."""
    disable_color_printing: bool = False
    """Print without colours, as is done anyway where the output is no terminal."""
    attention_freq: int = 0
    """Steps between two measurements of every layer's attention on held-out sequences: sink rate, share of
    zero weights, largest score, norm of the first value, kurtosis and largest output; 0: none."""
    attention_sequences: int = 4
    """Held-out sequences, the first ones, that attention_freq measures on."""
    attention_length: int = 0
    """Tokens of each of these sequences, from its first one, that attention_freq measures; 0: all."""
    spike_deviations: float = 6.0
    """A loss this many standard deviations above the mean of the last spike_window steps is a spike and is
    written to spikes/; 0: none is."""
    spike_window: int = 100
    """Number of previous losses that decide whether a loss is a spike; until then there are no spikes."""
    max_dumps: int = 10
    """Most steps that one process writes to spikes/, with spikes and non-finite losses counted together; 0: none."""

    def __post_init__(self) -> None:
        _require_name("metrics.save_tb_folder", self.save_tb_folder)
        _require(self.log_freq >= 1, "metrics.log_freq", self.log_freq, "at least 1")
        name = "metrics.attention_sequences"
        _require(self.attention_sequences >= 1, name, self.attention_sequences, "at least 1")
        _require(self.spike_window >= 2, "metrics.spike_window", self.spike_window, "at least 2")
        for name in ("attention_freq", "attention_length", "spike_deviations", "max_dumps"):
            value = getattr(self, name)
            _require(value >= 0, f"metrics.{name}", value, "at least 0")


@dataclass(kw_only=True, slots=True)
class Profiling:
    """``--profiling.*``: traces of steps and snapshots of GPU memory."""

    enable_profiling: bool = False
    """Write a trace of one step in every profile_freq with torch.profiler, for Perfetto or chrome://tracing."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces, within the dump folder."""
    profile_freq: int = 10
    """Steps between two traces or memory snapshots; at least 4, since 3 steps warm the profiler up."""
    enable_memory_snapshot: bool = False
    """Write a snapshot of the GPU's memory every profile_freq steps and when it runs out, for
    https://pytorch.org/memory_viz."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, within the dump folder."""

    def __post_init__(self) -> None:
        _require_name("profiling.save_traces_folder", self.save_traces_folder)
        name = "profiling.save_memory_snapshot_folder"
        _require_name(name, self.save_memory_snapshot_folder)
        _require(self.profile_freq >= 4, "profiling.profile_freq", self.profile_freq, "at least 4")


@dataclass(kw_only=True, slots=True)
class Comm:
    """``--comm.*``: how long processes wait for one another, and the trace that a timeout leaves."""

    init_timeout_seconds: int = 300
    """Seconds that a process waits for the others up to the end of its first step."""
    train_timeout_seconds: int = 100
    """Seconds that it waits for them from then on; then the run ends."""
    trace_buf_size: int = 20000
    """Collectives that torch's flight recorder keeps; a timeout writes them to comm_traces/, which
    torchfrtrace reads; 0: none."""

    def __post_init__(self) -> None:
        for name in ("init_timeout_seconds", "train_timeout_seconds"):
            value = getattr(self, name)
            # sockets count milliseconds in 32 bits
            expected = "between 1 and 2000000"
            _require(1 <= value <= 2_000_000, f"comm.{name}", value, expected)
        # torch takes the memory for all of them at once
        is_valid = 0 <= self.trace_buf_size <= 1_000_000
        _require(is_valid, "comm.trace_buf_size", self.trace_buf_size, "between 0 and 1000000")


@dataclass(kw_only=True, slots=True)
class MemoryEstimation:
    """``--memory_estimation.*``: an estimate of the peak memory instead of a run."""

    enabled: bool = False
    """Print an estimate of one process's peak memory, from two simulated steps, and end. Nothing is trained,
    and no dump folder is made."""
    disable_fake_mode: bool = False
    """Estimate with real tensors, which takes the memory that it estimates, instead of fake ones."""

    def __post_init__(self) -> None:
        _require(
            self.enabled or not self.disable_fake_mode,
            "memory_estimation.disable_fake_mode",
            self.disable_fake_mode,
            "given together with --memory_estimation.enabled",
        )


@dataclass(kw_only=True, slots=True)
class Sample:
    """``--sample.*``: the text that the trained model writes at the end of a run."""

    prompt: str = "The "
    """Text that the trained model is asked to continue when the run ends."""
    max_new_tokens: int = 200
    """Tokens to write; 0: none."""
    temperature: float = 0.8
    """Sampling temperature; 0: the likeliest token each time."""

    def __post_init__(self) -> None:
        _require(
            self.max_new_tokens >= 0, "sample.max_new_tokens", self.max_new_tokens, "at least 0"
        )
        _require(
            self.temperature == 0 or 0.01 <= self.temperature <= 100,
            "sample.temperature",
            self.temperature,
            "0, or between 0.01 and 100",
        )


@dataclass(kw_only=True, slots=True)
class JobConfig:
    """All flags of a run, one field per section, in the order of ``bash train.sh -h``; checks what involves two sections."""

    job: Job = field(default_factory=Job)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    experimental: Experimental = field(default_factory=Experimental)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    memory_estimation: MemoryEstimation = field(default_factory=MemoryEstimation)
    sample: Sample = field(default_factory=Sample)

    def __post_init__(self) -> None:
        names = {
            "checkpoint.folder": self.checkpoint.folder,
            "metrics.save_tb_folder": self.metrics.save_tb_folder,
            "profiling.save_traces_folder": self.profiling.save_traces_folder,
            "profiling.save_memory_snapshot_folder": self.profiling.save_memory_snapshot_folder,
        }
        for flag, name in names.items():
            others = [other for other, taken in names.items() if taken == name and other != flag]
            expected = f"a folder of its own, not that of --{others[0] if others else flag}"
            _require(not others, flag, name, expected)
        streaming, share = self.training.streaming, self.validation.share
        _require(
            not streaming or share == 0,
            "validation.share",
            share,
            "0 with --training.streaming, which does not know how many tokens there are: hold out "
            "--validation.sequences instead",
        )
        _require(
            streaming or self.validation.sequences == 0,
            "validation.sequences",
            self.validation.sequences,
            "0 without --training.streaming, where --validation.share says what is held out",
        )
        _require(
            self.metrics.attention_freq == 0 or self.validates,
            "metrics.attention_freq",
            self.metrics.attention_freq,
            "0 without held-out sequences (--validation.share, --validation.sequences)",
        )
        _require(
            self.metrics.attention_freq == 0 or self.experimental.context_parallel_degree == 1,
            "metrics.attention_freq",
            self.metrics.attention_freq,
            "0 with --experimental.context_parallel_degree, under which no process has all queries",
        )
        length, T = self.metrics.attention_length, self.training.seq_len
        tensor = self.training.tensor_parallel_degree
        _require(
            length <= T and length % tensor == 0,
            "metrics.attention_length",
            length,
            f"at most --training.seq_len {T} and a multiple of --training.tensor_parallel_degree {tensor}",
        )

    @property
    def validates(self) -> bool:
        """Whether anything is held out."""
        return self.validation.share > 0 or self.validation.sequences > 0

    @property
    def dump_folder(self) -> Path:
        """``job.dump_folder``, or its default: ``exp/`` and the name of the model configuration."""
        return Path(self.job.dump_folder or Path("exp") / Path(self.model.config).stem)

    def flags(self) -> dict[str, Any]:
        """Dotted name -> value, in the order of the sections above."""
        return {
            f"{section.name}.{option.name}": getattr(getattr(self, section.name), option.name)
            for section in dataclasses.fields(self)
            for option in dataclasses.fields(getattr(self, section.name))
        }

    def to_toml(self) -> str:
        """The file that ``--job.config_file`` reads back to this configuration."""
        lines: list[str] = []
        for section in dataclasses.fields(self):
            lines.append(f"[{section.name}]")
            for option in dataclasses.fields(getattr(self, section.name)):
                value = getattr(getattr(self, section.name), option.name)
                # TOML has no null: an absent key is the default, None. Strings, numbers and booleans
                # are written as in JSON, but for DEL, which TOML wants escaped.
                if value is not None:
                    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                    lines.append(f"{option.name} = {text}")
            lines.append("")
        return "\n".join(lines)
