"""Our model and configuration in the form that torchtitan's trainer expects."""

import copy
import os

import torch
from torch import nn

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.initial_weights import initialize_weights
from flame.loss import LinearLoss
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM

# isort: split
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol


class ModelArgs(BaseModelArgs):
    """Carries the model's configuration, and the seed of its weights, through torchtitan."""

    def __init__(self, config: SoftpickTransformerConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def update_from_config(self, job_config: TitanConfig) -> None:
        """The configuration is complete already."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs of a token by torchtitan's own convention.

        6 for every weight that is multiplied, and the attention products without the causal half taken
        off (PaLM, arXiv:2204.02311, appendix B), so that MFU compares with others' figures.
        """
        c = self.config
        num_parameters = sum(p.numel() for p in model.parameters())
        num_embedding = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)
        )
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len
        return num_parameters, 6 * (num_parameters - num_embedding) + attention


class TitanModel(ModelProtocol):
    """The Hugging Face model with tensors in and logits out.

    Parameters keep their Hugging Face names, so that exporting a checkpoint renames nothing.
    """

    def __init__(self, model_args: ModelArgs) -> None:
        super().__init__(model_args)
        self.seed = model_args.seed
        # a copy, since a model marks its configuration with the attention it runs
        hf = SoftpickTransformerForCausalLM(copy.deepcopy(model_args.config))
        self.model, self.lm_head = hf.model, hf.lm_head
        # outside the module tree, where it would give every parameter a second name
        self.__dict__["hf"] = hf

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        initialize_weights(self.hf, self.seed)
        if buffer_device is not None:
            # offloaded weights stay on the host, but what is computed with is on the device
            for module in self.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(buffer_device))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        linear_loss: LinearLoss | None = None,
    ) -> torch.Tensor:
        """Logits ``[B, T, vocabulary]`` of tokens ``[B, T]``, or with ``labels`` ``[B, T]`` their ``linear_loss``.

        With ``positions`` ``[B, T]`` and ``cu_seqlens`` ``[N + 1]``, bounds in the rows laid end to end, the
        rows are one packed row for the layers, and attention sees the own sequence alone. ``positions`` ``[1, T]``
        without are the places of the tokens in their sequence, 0 to ``T - 1`` by default.

        The decoder's loop stands here because Llama's own forward derives a mask from the positions,
        which makes the host wait for the GPU in every micro-batch.
        """
        decoder = self.model
        B, T = input_ids.shape
        extra = {}
        if cu_seqlens is not None:
            # the names that transformers has for flash attention
            extra = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            input_ids, positions = input_ids.view(1, B * T), positions.view(1, B * T)
            # each batch has another number of sequences, and layers are not to be compiled for each
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        elif positions is None:
            positions = torch.arange(T, device=input_ids.device)[None]
        if self.hf.config.attn_log_scale:
            # told, since under context parallelism a layer does not have the keys
            extra["num_keys"] = positions + 1
        hidden = decoder.embed_tokens(input_ids)
        if torch.is_autocast_enabled(hidden.device.type):
            # the sum that runs through the layers is rounded in one process as FSDP2's policy rounds it in several
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        position_embeddings = decoder.rotary_emb(hidden, positions)
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=position_embeddings, **extra)
        hidden = decoder.norm(hidden)
        if linear_loss is not None:
            # here, where FSDP has the weights of the head whole
            weight = self.lm_head.weight
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            return linear_loss(hidden.flatten(0, 1), weight, labels.flatten())
        logits = self.lm_head(hidden)
        return logits if cu_seqlens is None else logits.view(B, T, -1)


def titan_config(config: JobConfig) -> TitanConfig:
    """The configuration as torchtitan's sections; the only place that knows their names."""
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
    # more than there are would be shortened as well, with a warning of every process
    c.lr_scheduler.warmup_steps = min(config.lr_scheduler.warmup_steps, t.steps)
    c.lr_scheduler.decay_ratio = config.lr_scheduler.decay_ratio
    c.lr_scheduler.decay_type = config.lr_scheduler.decay_type
    c.lr_scheduler.min_lr_factor = config.lr_scheduler.lr_min
    c.training.local_batch_size = t.batch_size
    c.training.global_batch_size = global_batch_size(config)
    c.training.seq_len = t.seq_len
    c.training.max_norm = t.max_norm
    c.training.steps = t.steps
    # what torchtitan's autocast is given; `FlameTrainer` takes it away for float32
    c.training.mixed_precision_param = "bfloat16"
    c.training.enable_cpu_offload = t.enable_cpu_offload
    c.training.gc_freq = t.gc_freq
    c.debug.seed = t.seed
    c.debug.deterministic = t.deterministic
    c.compile.enable = t.compile
    if t.tensor_parallel_degree > 1:
        # torch 2.13 caches a compiled loss over sharded logits with the first word of the shard in it: the
        # next run would take another process's, and twice the loss, without an error
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
    # `Checkpointer` takes the place of torchtitan's, which is built before it
    c.checkpoint.enable = False
    # what torchtitan's loop passes to it
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
