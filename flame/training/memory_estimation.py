"""``--memory_estimation.enabled``: the peak memory of one process, from two steps that are simulated.

The model is built, sharded and trained as in a run, but with fake tensors, which have no data, and a fake process
group (`torch.distributed._tools`). Two steps, since the first creates the optimizer's state. Layers run eagerly, so
the estimate leaves out what torch.compile saves. The batch is the first one of the run. What cannot be simulated,
such as a kernel without a fake implementation, is refused.
"""

import contextlib
import copy
import os

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from flame.base.errors import UsageError
from flame.base.log import logger
from flame.config.sections import JobConfig
from flame.models.linear_loss import LinearLoss, linear_loss
from flame.run.inputs import RunInputs
from flame.titan.config import titan_config, world_size
from flame.titan.mesh import Layout
from flame.titan.model import ModelArgs, TitanModel
from flame.titan.parallelize import parallelize
from flame.titan.patches import DEVICE_TYPE
from flame.titan.upstream import build_cross_entropy_loss, build_optimizers, dist_utils

STEPS = 2
_REAL = "--memory_estimation.disable_fake_mode estimates it with real tensors"


def estimate_memory(config: JobConfig, inputs: RunInputs) -> dict[str, float]:
    """Prints the estimate and returns it: MiB by kind, and their ``Total``, at the peak of one process.

    Raises:
        UsageError: The layout cannot be simulated.
    """
    if os.environ["RANK"] != "0":
        return {}
    is_fake = not config.memory_estimation.disable_fake_mode
    linear = linear_loss(config.training.loss, DEVICE_TYPE)
    if is_fake and linear is not None:
        raise UsageError(
            f"--memory_estimation.enabled: --training.loss {config.training.loss} is a kernel that cannot be "
            f"simulated; {_REAL}"
        )
    config = copy.deepcopy(config)
    config.training.compile = False
    titan = titan_config(config)
    p = titan.parallelism
    others = {
        "--training.tensor_parallel_degree": p.tensor_parallel_degree,
        "--experimental.context_parallel_degree": p.context_parallel_degree,
        "--training.data_parallel_replicate_degree": p.data_parallel_replicate_degree,
    }
    for flag, degree in others.items():
        if degree > 1:
            raise UsageError(
                f"--memory_estimation.enabled supports one process and FSDP, not {flag} {degree}"
            )
    dist_utils.init_fake_mode(world_size())
    try:
        dims = Layout(
            dp_shard=p.data_parallel_shard_degree,
            dp_replicate=1,
            cp=1,
            tp=1,
            pp=1,
            ep=1,
            etp=1,
            world_size=world_size(),
        )
        # built with real tensors: the mesh reads its ranks as numbers
        dims.build_mesh()
        batch = _first_batch(inputs)
        mode = FakeTensorMode() if is_fake else None
        with mode or contextlib.nullcontext():
            # a run builds on meta and moves to the device; fake parameters cost nothing and cannot be moved
            with torch.device(DEVICE_TYPE if is_fake else "meta"):
                model = TitanModel(ModelArgs(inputs.model, config.training.seed))
            model = parallelize(model, dims, config)
            if not is_fake:
                model.to_empty(device=DEVICE_TYPE)
            tensors = {name: _on_device(x, mode) for name, x in batch.items()}
            peak = _peak(model, config, dims, tensors, linear)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        attn_impl = inputs.model.attn_impl
        raise UsageError(
            f"--memory_estimation.enabled: --training.varlen with attn_impl {attn_impl} reads the bounds of "
            f"documents, which cannot be simulated; {_REAL}"
        ) from error
    finally:
        dist.destroy_process_group()
    logger.info(
        f"estimate for one of {world_size()} processes, batch_size {config.training.batch_size}, "
        f"seq_len {config.training.seq_len}: {peak['Total']:,.1f} MiB at the peak, without the "
        "allocator's gaps and what torch.compile saves"
    )
    for kind, mib in sorted(peak.items(), key=lambda item: -item[1]):
        if kind != "Total" and mib:
            logger.info(f"  {kind:16} {mib:12,.1f} MiB")
    return peak


def _first_batch(inputs: RunInputs) -> dict[str, torch.Tensor]:
    """The first batch of the first process, with its ``labels``, on the host."""
    loader = inputs.data.loader(dp_rank=0, dp_world_size=world_size())
    try:
        tensors, labels = next(iter(loader))
    finally:
        loader.close()
    return tensors | {"labels": labels}


def _on_device(x: torch.Tensor, mode: FakeTensorMode | None) -> torch.Tensor:
    return (x if mode is None else mode.from_tensor(x)).to(DEVICE_TYPE)


def _peak(
    model: TitanModel,
    config: JobConfig,
    dims: Layout,
    tensors: dict[str, torch.Tensor],
    linear: LinearLoss | None,
) -> dict[str, float]:
    titan = titan_config(config)
    optimizers = build_optimizers([model], titan.optimizer, dims)
    loss_fn = build_cross_entropy_loss(titan)
    t = config.training
    rest = {name: x for name, x in tensors.items() if name not in ("input", "labels")}
    tokens, labels = tensors["input"], tensors["labels"]
    if t.mixed_precision_param == "float32":
        amp = contextlib.nullcontext()
    else:
        amp = dist_utils.maybe_enable_amp(dims, t.mixed_precision_param, DEVICE_TYPE)  # pyright: ignore[reportArgumentType]  # set_precision has replaced None
    if dims.fsdp_enabled:
        tracker = FSDPMemTracker(model, optimizers.optimizers[0])
        tracker.track_inputs(tuple(tensors.values()))
    else:
        tracker = MemTracker()
        tracker.track_external(model, optimizers.optimizers[0], *tensors.values())
    with tracker:
        for _ in range(STEPS):
            optimizers.zero_grad()
            for _ in range(t.gradient_accumulation_steps):
                # the tracker supports one forward pass of a module, not several
                tracker.reset_mod_stats()
                with amp:
                    if linear is None:
                        loss = loss_fn(model(tokens, **rest), labels)
                    else:
                        loss = model(tokens, **rest, labels=labels, linear_loss=linear)
                loss.backward()
            dist_utils.clip_grad_norm_(list(model.parameters()), t.max_norm, foreach=True)
            optimizers.step()
    peak = tracker.get_tracker_snapshot("peak")
    # matched by type, since a CPU device has no index
    (snapshot,) = (s for where, s in peak.items() if where.type == DEVICE_TYPE)
    return {getattr(kind, "value", kind): size / 2**20 for kind, size in snapshot.items()}
