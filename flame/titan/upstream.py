"""The parts of torchtitan that other rooms build on, imported here so that the patches come first."""

from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig as TitanConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.protocols import train_spec
from torchtitan.tools.utils import NoColor
from torchtitan.train import Trainer

__all__ = [
    "BaseValidator",
    "MetricsProcessor",
    "ModelWrapper",
    "NoColor",
    "ParallelDims",
    "TitanConfig",
    "Trainer",
    "build_cross_entropy_loss",
    "build_lr_schedulers",
    "build_optimizers",
    "dist_utils",
    "train_spec",
]
