"""``python -m flame.lm_eval ...``: the command line of EleutherAI's lm-evaluation-harness, which then knows our models.

``lm_eval`` loads a model through transformers' Auto classes, and these know ``softpick_transformer`` once `flame.models`
is imported. Everything else, flags and output included, is the harness's own.
"""

import flame.models  # noqa: F401
from flame.errors import UsageError, exit_on_usage_error


def main() -> None:
    with exit_on_usage_error():
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
