"""Our configuration in the form of torchtitan's sections."""

import os

from torchtitan.config import JobConfig as TitanConfig

from flame.config.sections import JobConfig


def titan_config(config: JobConfig) -> TitanConfig:
    """The configuration as torchtitan's sections; their names are known only here."""
    c, t = TitanConfig(), config.training
    c.job.dump_folder = str(config.dump_folder)
    c.job.description = config.job.description
    c.model.name = c.model.flavor = "flame"
    c.optimizer.name = config.optimizer.name
    c.optimizer.lr = config.optimizer.lr
    c.optimizer.beta1 = config.optimizer.beta1
    c.optimizer.beta2 = config.optimizer.beta2
    c.optimizer.eps = config.optimizer.eps
    c.optimizer.weight_decay = config.optimizer.weight_decay
    c.optimizer.implementation = config.optimizer.implementation
    # torchtitan would shorten more warm-up steps than steps too, with a warning from every process
    c.lr_scheduler.warmup_steps = min(config.lr_scheduler.warmup_steps, t.steps)
    c.lr_scheduler.decay_ratio = config.lr_scheduler.decay_ratio
    c.lr_scheduler.decay_type = config.lr_scheduler.decay_type
    c.lr_scheduler.min_lr_factor = config.lr_scheduler.lr_min
    c.training.local_batch_size = t.batch_size
    c.training.global_batch_size = global_batch_size(config)
    c.training.seq_len = t.seq_len
    c.training.max_norm = t.max_norm
    c.training.steps = t.steps
    # the dtype of torchtitan's autocast; `FlameTrainer` turns autocast off for float32
    c.training.mixed_precision_param = "bfloat16"
    c.training.enable_cpu_offload = t.enable_cpu_offload
    c.training.gc_freq = t.gc_freq
    c.debug.seed = t.seed
    c.debug.deterministic = t.deterministic
    c.compile.enable = t.compile
    if t.tensor_parallel_degree > 1:
        # torch 2.13 caches a compiled loss over sharded logits with the first vocabulary index of the shard in it: the
        # next run would silently use that of another process, and compute twice the loss
        c.compile.components = ["model"]
    c.parallelism.data_parallel_replicate_degree = t.data_parallel_replicate_degree
    c.parallelism.data_parallel_shard_degree = t.data_parallel_shard_degree
    c.parallelism.tensor_parallel_degree = t.tensor_parallel_degree
    c.parallelism.disable_loss_parallel = t.disable_loss_parallel
    c.parallelism.context_parallel_degree = config.experimental.context_parallel_degree
    c.activation_checkpoint.mode = config.activation_checkpoint.mode
    c.activation_checkpoint.selective_ac_option = config.activation_checkpoint.selective_ac_option
    # nothing in the model draws random numbers
    c.activation_checkpoint.preserve_rng_state = False
    # `Checkpointer` replaces torchtitan's, which is built before it
    c.checkpoint.enable = False
    # torchtitan's loop passes it to `Checkpointer`
    c.checkpoint.load_step = config.checkpoint.load_step
    c.metrics.log_freq = config.metrics.log_freq
    c.metrics.disable_color_printing = config.metrics.disable_color_printing
    c.profiling.enable_profiling = config.profiling.enable_profiling
    c.profiling.save_traces_folder = config.profiling.save_traces_folder
    c.profiling.profile_freq = config.profiling.profile_freq
    c.profiling.enable_memory_snapshot = config.profiling.enable_memory_snapshot
    c.profiling.save_memory_snapshot_folder = config.profiling.save_memory_snapshot_folder
    c.comm.init_timeout_seconds = config.comm.init_timeout_seconds
    c.comm.train_timeout_seconds = config.comm.train_timeout_seconds
    c.comm.trace_buf_size = config.comm.trace_buf_size
    c.validation.enable = config.validates
    c.validation.freq = config.validation.freq
    return c


def world_size() -> int:
    """Processes of this run, as torchrun counts them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_batch_size(config: JobConfig, num_processes: int | None = None) -> int:
    """Sequences in an optimizer step of a run of ``num_processes``, by default this one's."""
    t = config.training
    # processes that see the same sequences
    shared = t.tensor_parallel_degree * config.experimental.context_parallel_degree
    return (
        t.batch_size * t.gradient_accumulation_steps * ((num_processes or world_size()) // shared)
    )
