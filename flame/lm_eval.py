"""``python -m flame.lm_eval ...``: the command line of EleutherAI's lm-evaluation-harness, for this project's models.

``lm_eval`` loads a model through transformers' Auto classes, which know ``softpick_transformer`` once `flame.models`
is imported. Everything else, flags and output included, is the harness's, except the token before a text: see
`begin_texts_as_training_did`.
"""

from flame.base.stop_signals import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    # before the other imports, which take seconds
    end_at_interrupt()

import re
import sys
from functools import partial, wraps
from pathlib import Path
from typing import Any

import flame.models
from flame.base.errors import UsageError, exit_on_usage_error
from flame.base.paths import expand
from flame.data.bos import before_prompt


def require_model(argv: list[str]) -> None:
    """Refuses a folder without a model, for which the harness prints a traceback.

    Raises:
        UsageError: ``pretrained=`` names a folder without a model, or one that does not exist.
    """
    if any("gguf_file=" in word for word in argv):
        # a GGUF file includes the configuration
        return
    for name in (x for word in argv for x in re.findall(r"\bpretrained=([^,]+)", word)):
        folder = Path(expand("--model_args pretrained", name))
        # names on the hub have at most one slash
        is_local = folder.exists() or folder.is_absolute() or len(folder.parts) > 2
        if is_local and not (folder / "config.json").is_file():
            raise UsageError(
                f"--model_args pretrained={folder} must be a folder with config.json, as <dump folder>/hf of a run"
            )


def begin_texts_as_training_did(harness: type[Any]) -> None:
    """Makes the harness begin the texts of this project's models as their tokenizer does.

    The harness begins a text without context with the tokenizer's bos, which a model trained without bos has never
    seen. If the tokenizer adds a bos as well, the harness scores this second bos as if it were text.

    Args:
        harness: lm_eval's ``HFLM``, which is changed.
    """
    prefix_token_id, rolling = harness.prefix_token_id, harness.loglikelihood_rolling

    def begins_with(self: Any) -> int:
        if self.custom_prefix_token_id is not None or not _is_ours(self):
            return prefix_token_id.fget(self)
        return [self.tokenizer.eos_token_id, *before_prompt(self.tokenizer, "tokenizer")][-1]

    @wraps(rolling)
    def rolling_without_second_bos(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return rolling(self, *args, **kwargs)
        self.tok_encode = partial(harness.tok_encode, self, add_special_tokens=False)
        try:
            return rolling(self, *args, **kwargs)
        finally:
            del self.tok_encode

    harness.prefix_token_id = property(begins_with)
    harness.loglikelihood_rolling = rolling_without_second_bos


def _is_ours(harness: Any) -> bool:
    return harness.config.model_type == flame.models.SoftpickTransformerConfig.model_type


def main() -> None:
    """Runs the command line of lm_eval on an exported model."""
    with exit_on_usage_error():
        require_model(sys.argv)
        try:
            # an extra, so not every installation has it
            from lm_eval.__main__ import cli_evaluate
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise UsageError(
                f"flame.lm_eval needs the package lm_eval ({error}): pip install -e '.[eval]'"
            ) from None
    begin_texts_as_training_did(HFLM)
    cli_evaluate()


if __name__ == "__main__":
    raise_at_interrupt()
    main()
