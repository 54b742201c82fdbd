"""The models that are measured: exported folders, checkpoints of runs, and other decoders of transformers."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PretrainedConfig as Config
from transformers import PreTrainedTokenizerFast as Tokenizer

from flame.checkpoint_folder import describe_failure, is_complete
from flame.convert import dcp_to_hf
from flame.data import load_tokenizer
from flame.errors import UsageError
from flame.models import SoftpickTransformerConfig, normalizer_of, read_config
from flame.models.attention import IMPLEMENTATIONS
from flame.run_folder import RUN_FILE

OWN = "own"
"""Value of --attn_implementation: what the model's configuration says, and softmax where it says nothing."""
_SHAPE = "--model.config, "
_READING = (OSError, ValueError, TypeError, LookupError, SafetensorError)


@dataclass(frozen=True)
class Model:
    """A model that has not been loaded yet."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    operator: str
    """Name of an operator of `flame.models.attention`."""
    device: str
    is_checkpoint: bool

    @property
    def normalizer(self) -> str:
        return normalizer_of(self.operator)

    def fields(self) -> dict[str, Any]:
        """What tells one arm from another."""
        names = ("attn_sink", "attn_gate", "attn_log_scale")
        shape = ("num_hidden_layers", "num_attention_heads", "hidden_size")
        extra = {name: True for name in names if getattr(self.config, name, False)}
        return (
            {"normalizer": self.normalizer}
            | extra
            | {name: getattr(self.config, name) for name in shape}
        )

    def load(self) -> PreTrainedModel:
        """The model in float32, ready to be measured.

        Raises:
            UsageError: Its files are missing or damaged, or a weight is not finite.
        """
        try:
            if not self.is_checkpoint:
                return self._load(self.path)
            with tempfile.TemporaryDirectory(prefix="flame-analyze-") as folder:
                out = Path(folder) / "hf"
                dcp_to_hf(self.path, config=self.config, tokenizer=self.tokenizer, out=out)
                return self._load(out)
        except UsageError:
            raise
        except CheckpointException as error:
            raise UsageError(f"--model {self.path}: {describe_failure(error)}") from None
        except _READING as error:
            raise _unreadable(self.path, error) from None

    def _load(self, folder: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=self.operator
        )
        for name, x in model.named_parameters():
            if not x.isfinite().all():
                raise UsageError(f"--model {self.path} cannot be measured: {name} is not finite")
        return model.to(self.device).eval()


def find_model(path: Path, attn_implementation: str, device: str) -> Model:
    """Reads configuration and tokenizer of a Hugging Face folder or of a checkpoint ``step-N`` of a run.

    Args:
        attn_implementation: `OWN`, or a name of `flame.models.attention.IMPLEMENTATIONS` for a model of transformers
            whose configuration names none.

    Raises:
        UsageError: There is no such model, or it does not say what it is.
    """
    is_checkpoint = is_complete(path)
    if is_checkpoint:
        config, tokenizer = _of_checkpoint(path)
    elif (path / "config.json").is_file():
        config, tokenizer = _of_folder(path)
    else:
        raise UsageError(
            f"--model {path} must be a Hugging Face folder, such as <dump_folder>/hf, or a checkpoint "
            "<dump_folder>/checkpoint/step-N"
        )
    own = getattr(config, "attn_impl", None)
    if own is not None and attn_implementation != OWN:
        raise UsageError(
            f"--attn_implementation {attn_implementation}: --model {path} was trained with {own}; give {OWN} for it"
        )
    operator = (
        own or IMPLEMENTATIONS["softmax" if attn_implementation == OWN else attn_implementation]
    )
    if device == "cpu":
        # the same function: Triton's kernels need a GPU
        operator = operator.replace("parallel_", "naive_", 1)
    return Model(path, config, tokenizer, operator, device, is_checkpoint)


def _of_folder(path: Path) -> tuple[Config, Tokenizer]:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        is_ours = raw.get("model_type") == SoftpickTransformerConfig.model_type
        config = read_config(path) if is_ours else AutoConfig.from_pretrained(path)
        return config, AutoTokenizer.from_pretrained(path)
    except _READING as error:
        raise _unreadable(path, error) from None


def _of_checkpoint(path: Path) -> tuple[Config, Tokenizer]:
    """The model and the tokenizer that the run of a checkpoint names."""
    files = [folder / RUN_FILE for folder in list(path.resolve().parents)[:3]]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UsageError(
            f"--model {path}: no {RUN_FILE} above it says what it is; convert it with python -m flame.convert dcp-to-hf"
        )
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        fields = {k.removeprefix(_SHAPE): v for k, v in run.items() if k.startswith(_SHAPE)}
        config = SoftpickTransformerConfig(**fields)
        return config, load_tokenizer(run["--model.tokenizer_path"])
    except _READING as error:
        raise UsageError(
            f"--model {path}: {file} does not tell its model: {' '.join(str(error).split())}"
        ) from None


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"--model {path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}"
    )
