"""``python -m flame.lm_eval ...``: the command line of EleutherAI's lm-evaluation-harness, which then knows our models.

``lm_eval`` loads a model through transformers' Auto classes, and these know ``softpick_transformer`` once `flame.models`
is imported. Everything else, flags and output included, is the harness's own.
"""

import re
import sys
from pathlib import Path

import flame.models  # noqa: F401
from flame.errors import UsageError, exit_on_usage_error
from flame.paths import expand


def require_model(argv: list[str]) -> None:
    """Refuses a folder that holds no model, which the harness tells by a traceback.

    Raises:
        UsageError: ``pretrained=`` names a folder without a model, or one that is not there.
    """
    if any("gguf_file=" in word for word in argv):
        # which holds the configuration too
        return
    for name in (x for word in argv for x in re.findall(r"\bpretrained=([^,]+)", word)):
        folder = Path(expand("--model_args pretrained", name))
        # names on the hub have one slash at most
        is_local = folder.exists() or folder.is_absolute() or len(folder.parts) > 2
        if is_local and not (folder / "config.json").is_file():
            raise UsageError(
                f"--model_args pretrained={folder} must be a folder with config.json, as <dump folder>/hf of a run"
            )


def main() -> None:
    with exit_on_usage_error():
        require_model(sys.argv)
        try:
            # an extra, so not every installation has it
            from lm_eval.__main__ import cli_evaluate
        except ImportError as error:
            raise UsageError(
                f"flame.lm_eval needs the package lm_eval ({error}): pip install -e '.[eval]'"
            ) from None
    cli_evaluate()


if __name__ == "__main__":
    main()
