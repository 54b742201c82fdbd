"""Our model and configuration in the form that torchtitan's trainer expects."""

import os
from typing import Any

import torch
from torch import nn

import flame._compat  # noqa: F401  # before torchtitan
from flame.config import JobConfig
from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM

# isort: split
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol


class ModelArgs(BaseModelArgs):
    """Carries the model's configuration through torchtitan."""

    def __init__(self, config: SoftpickTransformerConfig) -> None:
        super().__init__()
        self.config = config

    def update_from_config(self, job_config: TitanConfig, **kwargs: Any) -> None:
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
        hf = SoftpickTransformerForCausalLM(model_args.config)
        self.model, self.lm_head = hf.model, hf.lm_head
        # outside the module tree, where it would give every parameter a second name
        self.__dict__["hf"] = hf

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        # materialising a meta model leaves the marks of the initialisation done on meta
        for x in (*self.hf.modules(), *self.hf.parameters()):
            x._is_hf_initialized = False
        self.hf.init_weights()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, vocabulary]`` of tokens ``[B, T]``.

        The decoder's loop stands here because Llama's own forward derives a mask from the positions,
        which makes the host wait for the GPU in every micro-batch.
        """
        decoder = self.model
        hidden = decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position_embeddings = decoder.rotary_emb(hidden, positions)
        for layer in decoder.layers:
            hidden = layer(hidden, position_embeddings=position_embeddings)
        return self.lm_head(decoder.norm(hidden))


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
    c.lr_scheduler.warmup_steps = config.lr_scheduler.warmup_steps
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
    c.debug.seed = t.seed
    c.compile.enable = t.compile
    c.parallelism.data_parallel_replicate_degree = t.data_parallel_replicate_degree
    c.parallelism.data_parallel_shard_degree = t.data_parallel_shard_degree
    c.checkpoint.enable = config.checkpoint.enable_checkpoint
    c.checkpoint.folder = config.checkpoint.folder
    c.checkpoint.interval = config.checkpoint.interval
    c.checkpoint.keep_latest_k = config.checkpoint.keep_latest_k
    c.checkpoint.load_step = config.checkpoint.load_step
    # the last checkpoint is one to continue from, like the others
    c.checkpoint.last_save_model_only = False
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
    c.validation.enable = config.validation.share > 0
    c.validation.freq = config.validation.freq
    return c


def world_size() -> int:
    """Processes of this run, as torchrun counts them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def global_batch_size(config: JobConfig) -> int:
    """Sequences in an optimizer step."""
    t = config.training
    return t.batch_size * t.gradient_accumulation_steps * world_size()
