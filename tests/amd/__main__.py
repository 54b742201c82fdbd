"""Answers lines of JSON, a card and the name of a case in each, by lines of JSON.

    python -m amd

Needs a process in which Triton compiles: one that interprets kernels cannot.
"""

import gc
import json
import sys
import traceback

import upstream_packages


def main() -> None:
    upstream_packages.skip()
    import torch

    from amd.cases import BRIEF, PAIRWISE, PLANTED

    torch.set_num_threads(1)
    # the collector need not walk through what was imported, again and again
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        card, name = json.loads(line)
        answer = {"kernels": [], "error": None}
        try:
            answer["kernels"] = (BRIEF[card] | PAIRWISE[card] | PLANTED[card])[name]()
        except Exception:  # the test that asked shows it
            answer["error"] = traceback.format_exc(limit=-4)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
