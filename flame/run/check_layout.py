"""Refuses degrees of parallelism that do not fit the number of processes, the model or each other."""

from flame.base.errors import UsageError
from flame.config.sections import JobConfig
from flame.models import SoftpickTransformerConfig


def check_layout(
    config: JobConfig, model: SoftpickTransformerConfig, *, num_processes: int, device_type: str
) -> None:
    """Refuses degrees that do not fit the number of processes, the model or each other.

    Raises:
        UsageError: A degree does not fit; the message names the flags, their values and what is expected.
    """
    t = config.training
    tensor, context = t.tensor_parallel_degree, config.experimental.context_parallel_degree
    replicas, shards = t.data_parallel_replicate_degree, t.data_parallel_shard_degree
    used = replicas * tensor * context
    if num_processes % used or shards != -1 and used * shards != num_processes:
        raise UsageError(
            f"--training.data_parallel_replicate_degree {replicas}, "
            f"--training.data_parallel_shard_degree {shards}, "
            f"--training.tensor_parallel_degree {tensor} and "
            f"--experimental.context_parallel_degree {context} must multiply to the number of processes, "
            f"{num_processes} (NGPU)"
        )
    if t.loss != "cross_entropy" and tensor > 1:
        raise UsageError(
            f"--training.loss {t.loss} does not go with --training.tensor_parallel_degree {tensor}, which "
            "shards the vocabulary; take cross_entropy"
        )
    if t.varlen and context > 1:
        raise UsageError(
            f"--training.varlen does not go with --experimental.context_parallel_degree {context}: packed "
            "documents are short, so processes need not share one; leave out either"
        )
    for name in (
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
    ):
        size = getattr(model, name)
        if size % tensor:
            raise UsageError(
                f"--training.tensor_parallel_degree {tensor} must divide {name} {size} of "
                f"--model.config {config.model.config}"
            )
    # every process of a sequence holds two pieces of it, which tensor parallelism divides further
    pieces = tensor * (2 * context if context > 1 else 1)
    if t.seq_len % pieces:
        raise UsageError(
            f"--training.seq_len {t.seq_len} must be a multiple of {pieces}, for "
            f"--training.tensor_parallel_degree {tensor} times twice "
            f"--experimental.context_parallel_degree {context} where that is above 1"
        )
    if t.disable_loss_parallel and tensor == 1:
        raise UsageError(
            "--training.disable_loss_parallel has no effect without --training.tensor_parallel_degree "
            "above 1"
        )
    if num_processes == 1 and t.fsdp_reshard_after_forward != "default":
        raise UsageError(
            f"--training.fsdp_reshard_after_forward {t.fsdp_reshard_after_forward} has no effect in one "
            "process (NGPU), which gathers no weights"
        )
    if t.enable_cpu_offload and (num_processes == 1 or device_type == "cpu"):
        raise UsageError(
            f"--training.enable_cpu_offload needs several processes (NGPU) with a GPU each, got "
            f"{num_processes} on {device_type}"
        )
