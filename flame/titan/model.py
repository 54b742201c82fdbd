"""Adapts the model and its configuration to torchtitan's trainer."""

import copy

import torch
from torch import nn
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from flame.models import SoftpickTransformerConfig, SoftpickTransformerForCausalLM
from flame.models.initial_weights import initialize_weights
from flame.models.linear_loss import LinearLoss


class ModelArgs(BaseModelArgs):
    """Carries the model's configuration, and the seed of its weights, through torchtitan."""

    def __init__(self, config: SoftpickTransformerConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed

    def update_from_config(self, job_config: TitanConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # torchtitan declares **kwargs but passes none
        """The configuration is complete already."""

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and training FLOPs of a token by torchtitan's own convention.

        6 for every weight in a matrix product, plus the attention products without subtracting the causal half (PaLM,
        arXiv:2204.02311, appendix B), so that MFU is comparable with other projects.
        """
        c = self.config
        num_parameters = sum(p.numel() for p in model.parameters())
        num_embedding = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)
        )
        attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len  # pyright: ignore[reportOperatorIssue]  # the configuration has replaced a head_dim of None
        return num_parameters, 6 * (num_parameters - num_embedding) + attention


class TitanModel(ModelProtocol):
    """The Hugging Face model with tensors in and logits out.

    Parameters keep their Hugging Face names, so that exporting a checkpoint renames nothing.
    """

    hf: SoftpickTransformerForCausalLM

    def __init__(self, model_args: ModelArgs) -> None:
        super().__init__(model_args)
        self.seed = model_args.seed
        # a copy, since a model marks its configuration with the attention it runs
        hf = SoftpickTransformerForCausalLM(copy.deepcopy(model_args.config))
        self.model, self.lm_head = hf.model, hf.lm_head
        # kept outside the module tree, since as a submodule it would give every parameter a second name
        self.__dict__["hf"] = hf

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draws the weights from the seed, once the parameters are on their device, sharded or not.

        ``buffer_device`` gets the buffers if weights are offloaded.
        """
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

        With ``positions`` ``[B, T]`` and ``cu_seqlens`` ``[N + 1]``, bounds in the rows laid end to end, the layers
        get one packed row, and a token attends to its own sequence only. Without ``cu_seqlens``, ``positions``
        ``[1, T]`` are those of the tokens in their sequence, by default 0 to ``T - 1``.

        The decoder's loop is repeated here because Llama's own forward derives a mask from the positions,
        which makes the host wait for the GPU in every micro-batch.
        """
        decoder = self.model
        B, T = input_ids.shape
        extra = {}
        if cu_seqlens is not None:
            # the names that transformers has for flash attention
            extra = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
            input_ids, positions = input_ids.view(1, B * T), positions.view(1, B * T)  # pyright: ignore[reportOptionalMemberAccess]  # given together with cu_seqlens
            # each batch has another number of sequences, and layers are not to be compiled for each
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        elif positions is None:
            positions = torch.arange(T, device=input_ids.device)[None]
        if self.hf.config.attn_log_scale:
            # given here, since under context parallelism a layer does not have all keys
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
            # computed here, where FSDP has gathered the weights of the head
            weight = self.lm_head.weight
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            return linear_loss(hidden.flatten(0, 1), weight, labels.flatten())  # pyright: ignore[reportOptionalMemberAccess]  # given together with linear_loss
        logits = self.lm_head(hidden)
        return logits if cu_seqlens is None else logits.view(B, T, -1)
