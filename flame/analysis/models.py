"""The models that are measured: exported folders, checkpoints of runs, and other decoders of transformers."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers import PretrainedConfig as Config
from transformers import PreTrainedTokenizerFast as Tokenizer

from flame.analysis.lengths import training_length
from flame.base.errors import UsageError
from flame.checkpoints.huggingface import dcp_to_hf
from flame.checkpoints.step_folder import describe_failure, is_complete
from flame.data.bos import for_inference
from flame.data.tokenizer import load_tokenizer
from flame.models import SoftpickTransformerConfig, normalizer_of, read_config
from flame.models.attention import IMPLEMENTATIONS
from flame.models.loading import READING_ERRORS, load_model, unreadable
from flame.run.fingerprint import RUN_FILE, bos_of, model_of, read_run, run_of_checkpoint

OWN = "own"
"""Value of --attn_implementation: what the model's configuration says, and softmax where it says nothing."""
_FIELDS = ("num_hidden_layers", "num_attention_heads", "hidden_size")


@dataclass(frozen=True)
class ModelSource:
    """Where to load a model from, with its configuration and tokenizer; the weights are not loaded yet."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    operator: str
    """Name of an operator of `flame.models.attention`."""
    device: str
    is_checkpoint: bool
    run: dict[str, Any] = field(default_factory=dict)
    """Content of ``run.json`` of the run that trained it; empty if there is none."""

    @property
    def normalizer(self) -> str:
        """A key of `fla.ops.attn.softpick.NORMALIZERS`."""
        return normalizer_of(self.operator)

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model takes; None for any."""
        return getattr(self.config, "max_position_embeddings", None)

    def trained(self) -> dict[str, int | None]:
        """Training length and seed, None where no run says them."""
        return {
            "training_length": training_length(self.run),
            "seed": self.run.get("--training.seed"),
        }

    def fields(self) -> dict[str, Any]:
        """Fields of the configuration in which arms differ."""
        names = ("attn_sink", "attn_gate", "attn_log_scale")
        extra = {name: True for name in names if getattr(self.config, name, False)}
        return (
            {"normalizer": self.normalizer}
            | extra
            | {name: getattr(self.config, name) for name in _FIELDS}
        )

    def load(self) -> PreTrainedModel:
        """The model in float32, ready to be measured.

        Raises:
            UsageError: Its files are missing or damaged, or a weight is missing, unknown or not finite.
        """
        try:
            if not self.is_checkpoint:
                return self._load(self.path)
            with tempfile.TemporaryDirectory(prefix="flame-analyze-") as folder:
                out = Path(folder) / "hf"
                dcp_to_hf(self.path, config=self.config, tokenizer=self.tokenizer, out=out)  # pyright: ignore[reportArgumentType]  # checkpoints are of softpick_transformer models only
                return self._load(out)
        except UsageError as error:
            raise UsageError(f"--model {self.path}: {error}") from None
        except CheckpointException as error:
            raise UsageError(
                f"--model {self.path} cannot be read: {describe_failure(error)}"
            ) from None
        except READING_ERRORS as error:
            raise unreadable(self.path, error) from None

    def _load(self, folder: Path) -> PreTrainedModel:
        model = load_model(folder, dtype=torch.float32, attn_implementation=self.operator)
        return model.to(self.device).eval()  # pyright: ignore[reportArgumentType]  # transformers hides the signature of nn.Module.to


def find_model(
    path: Path, attn_implementation: str, device: str, run: Path | None = None
) -> ModelSource:
    """Reads configuration and tokenizer of a Hugging Face folder or of a checkpoint ``step-N`` of a run.

    Args:
        path: The folder.
        attn_implementation: `OWN`, or a name of `flame.models.attention.IMPLEMENTATIONS` for a model of transformers
            whose configuration names none.
        device: Where the model will run; on ``"cpu"`` with the PyTorch reference of its operator.
        run: Folder of the run that trained it, asked if there is no ``run.json`` above the model.

    Raises:
        UsageError: There is no such model, or it does not say what it is.
    """
    is_checkpoint = is_complete(path)
    if is_checkpoint:
        config, tokenizer = _read_checkpoint_run(path)
    elif (path / "config.json").is_file():
        config, tokenizer = _read_folder(path)
    else:
        raise UsageError(
            f"--model {path} must be a Hugging Face folder, such as <dump_folder>/hf, or a checkpoint "
            "<dump_folder>/checkpoint/step-N"
        )
    for name in (*_FIELDS, "vocab_size"):
        if not hasattr(config, name):
            raise UsageError(
                f"--model {path} must be a decoder of text: its model type {config.model_type} has no {name}"
            )
    # a model of transformers that ran under an operator of ours was saved with its name
    own = getattr(config, "attn_impl", None) or IMPLEMENTATIONS.get(
        config._attn_implementation or ""
    )
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
    above = run_of_checkpoint(path) if is_checkpoint else path.resolve().parent
    folders = [x for x in (above, run) if x is not None and (x / RUN_FILE).is_file()]
    try:
        said = read_run(folders[0]) if folders else {}
    except UsageError as error:
        raise UsageError(f"--model {path}: {error}") from None
    return ModelSource(path, config, tokenizer, operator, device, is_checkpoint, said)


def _read_folder(path: Path) -> tuple[Config, Tokenizer]:
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"config.json must be an object, got {type(raw).__name__}")
        is_ours = raw.get("model_type") == SoftpickTransformerConfig.model_type
        config = read_config(path) if is_ours else AutoConfig.from_pretrained(path)
    except READING_ERRORS as error:
        raise unreadable(path, error) from None
    try:
        return config, AutoTokenizer.from_pretrained(path)
    except READING_ERRORS as error:
        raise UsageError(
            f"--model {path} must hold the model's tokenizer, as its save_pretrained writes it: "
            f"{' '.join(str(error).split())}"
        ) from None


def _read_checkpoint_run(path: Path) -> tuple[Config, Tokenizer]:
    """The model and the tokenizer that the run of a checkpoint names."""
    folder = run_of_checkpoint(path)
    if folder is None:
        raise UsageError(
            f"--model {path}: no {RUN_FILE} above it says what it is; convert it with python -m flame.convert dcp-to-hf"
        )
    try:
        run = read_run(folder)
        tokenizer = load_tokenizer(run["--model.tokenizer_path"])
        return model_of(run), for_inference(tokenizer, bos_of(run))
    except READING_ERRORS as error:
        raise UsageError(
            f"--model {path}: {folder / RUN_FILE} does not name its model and tokenizer: {' '.join(str(error).split())}"
        ) from None
