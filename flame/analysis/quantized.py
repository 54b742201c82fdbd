"""Low-bit weights: replaces the weights of linear layers by their quantised values.

HQQ's half-quadratic solver (Badri and Shaji, mobiusml.github.io/hqq_blog), one of the quantisers of the paper's table,
as implemented in the package ``hqq``. Only the values are quantised, not the computation: they are stored in the
model's dtype, so that every arm runs the same layers and the same attention kernel, on any device.
"""

import torch
from torch import nn

from flame.base.errors import UsageError

BITS = (2, 3, 4, 8)


def require_hqq() -> None:
    """Raises UsageError where the package is missing: it is an extra."""
    try:
        import hqq.core.quantize  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"quantised weights need the package hqq ({error}): pip install -e '.[eval]'"
        ) from None


@torch.no_grad()
def quantize_weights(model: nn.Module, bits: int, group_size: int = 64) -> None:
    """Quantises the weights of the linear layers and replaces them by the dequantised values, in place.

    ``group_size`` consecutive weights of a row share a scale and a zero point, kept in float32. If a row is no multiple
    of it, a group continues in the next row. All `nn.Linear` but ``lm_head`` are quantised, as by the tools that the
    paper used; embeddings, norms and biases stay unchanged.

    Args:
        model: The model to change.
        bits: Bits of a weight: 2, 3, 4 or 8.
        group_size: A multiple of 8 that divides the number of weights of each layer.

    Raises:
        UsageError: Another ``bits`` or ``group_size``, no linear layer, or the package hqq is missing. The model is
            then unchanged.
    """
    if bits not in BITS:
        raise UsageError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits}")
    if group_size < 8 or group_size % 8:
        raise UsageError(f"group_size must be a multiple of 8, got {group_size}")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    if not layers:
        raise UsageError(f"{type(model).__name__} has no linear layer to quantise")
    for name, layer in layers.items():
        if layer.weight.numel() % group_size:
            raise UsageError(
                f"group_size must divide the {layer.weight.numel()} weights of {name}, got {group_size}"
            )
    require_hqq()
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    # groups along the input, as the kernels of quantised inference want them; at 4 bits hqq rounds the first zero point
    options = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)["weight_quant_params"]
    for layer in layers.values():
        # NOTE(numerics): in float32 on the CPU whatever the model is on: on a GPU hqq solves in float16, and the
        # arms' weights would depend on the machine
        values, meta = Quantizer.quantize(
            layer.weight.detach().float().cpu(), device="cpu", bitpack=False, **options
        )
        layer.weight.copy_(Quantizer.dequantize(values, meta | {"compute_dtype": torch.float32}))
