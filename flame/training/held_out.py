"""Measurements on the held-out sequences during training: validation loss and attention statistics."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flame.base.tensors import local_tensor
from flame.data.batches import IGNORE_INDEX
from flame.measure.while_training import Observer, observe
from flame.models import normalizer_of
from flame.titan.mesh import Layout
from flame.titan.upstream import BaseValidator, TitanConfig

if TYPE_CHECKING:
    from flame.models.softpick_transformer import SoftpickTransformerModel
    from flame.training.trainer import FlameTrainer


@torch.no_grad()
def validation_loss(trainer: "FlameTrainer") -> float:
    """Mean loss over the held-out tokens, in nats per token; the same on every rank."""
    model, dims = trainer.model_parts[0], trainer.parallel_dims
    mesh = dims.get_mesh("batch") if dims.dp_enabled else None
    batches = trainer.inputs.data.validation(
        dp_rank=mesh.get_local_rank() if mesh else 0,
        dp_world_size=mesh.size() if mesh else 1,
    )
    # [2] summed loss, number of tokens
    total = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    model.eval()
    with trainer.metrics_processor.pause():
        for input_dict, labels in batches:
            input_dict = {name: x.to(trainer.device) for name, x in input_dict.items()}
            labels = labels.to(trainer.device)
            with trainer.train_context(), trainer.maybe_enable_amp:
                total[0] += local_tensor(trainer.summed_loss(input_dict, labels))
            # under context parallelism each process has a part of the loss, but counts all labels
            total[1] += (labels != IGNORE_INDEX).sum() / dims.cp
        dist.all_reduce(total)
        loss, num_tokens = total.tolist()
    model.train()
    return loss / num_tokens


@torch.no_grad()
def attention_scalars(trainer: "FlameTrainer") -> dict[str, float]:
    """Statistics of every layer's attention on the first ``metrics.attention_sequences`` held-out sequences.

    Of each, the first ``metrics.attention_length`` tokens are measured. The sequences do not depend on the number of
    processes. All processes must call it.
    """
    model, dims = trainer.model_parts[0], trainer.parallel_dims
    attn_impl = trainer.inputs.model.attn_impl
    decoder: SoftpickTransformerModel = model.model  # pyright: ignore[reportAssignmentType]  # the model is a TitanModel, whose decoder is this class
    layers = len(decoder.layers)
    mesh = dims.get_mesh("batch") if dims.dp_enabled else None
    rank, size = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
    part = dims.get_mesh("tp").get_local_rank() if dims.tp_enabled else 0
    observer = Observer(layers, normalizer_of(attn_impl), trainer.device, sequence_part=part)
    batches = trainer.inputs.data.validation(dp_rank=rank, dp_world_size=size, batch_size=1)
    model.eval()
    with observe(decoder, attn_impl, observer), trainer.maybe_enable_amp:
        for i, (input_dict, labels) in enumerate(batches):
            if i * size >= trainer.config.metrics.attention_sequences:
                break
            # a process without a sequence left still runs the model, since gathering layers is a collective
            is_asked = i * size + rank < trainer.config.metrics.attention_sequences
            observer.is_counting = is_asked and bool((labels != IGNORE_INDEX).any())
            beginning = _beginning(input_dict, trainer.config.metrics.attention_length)
            on_device = {name: x.to(trainer.device) for name, x in beginning.items()}
            model(on_device.pop("input"), **on_device)
    model.train()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # without a backward pass the weights of the root module would stay gathered
            module.reshard()
    observer.reduce()
    return observer.scalars()


def _beginning(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The first ``length`` tokens of a batch of one row (`flame.data.batches.to_batch`); 0: all."""
    if not length:
        return inputs
    # documents that begin later become empty, which operators and statistics take
    return {
        name: x.clamp(max=length) if name == "cu_seqlens" else x[:, :length]
        for name, x in inputs.items()
    }


class Validator(BaseValidator):
    """Measures the validation loss inside the loop, except after the last step, when `flame.train` does."""

    def __init__(
        self,
        *,
        trainer: "FlameTrainer",
        # arguments that torchtitan passes; the trainer has those that are needed
        job_config: TitanConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: None,
        parallel_dims: Layout,
        loss_fn: Any,
        validation_context: Any,
        maybe_enable_amp: Any,
        metrics_processor: Any,
        pp_schedule: None,
        pp_has_first_stage: None,
        pp_has_last_stage: None,
    ) -> None:
        self.trainer = trainer

    def should_validate(self, step: int) -> bool:
        """True every ``validation.freq`` steps, but not after the last step."""
        config = self.trainer.config
        return step % config.validation.freq == 0 and step < config.training.steps

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measures the validation loss and logs it."""
        loss = self.trainer.validation_loss()
        self.trainer.metrics_processor.log_validation(loss, step)
