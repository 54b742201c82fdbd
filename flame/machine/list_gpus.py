"""``python -m flame.machine.list_gpus``: the PCI addresses of the GPUs that a process sees, in torch's order, as JSON.

It asks the GPU runtime, so that visible devices, UUIDs, CUDA_DEVICE_ORDER and partitions have the same effect as in a
run. It does so in a separate process, so that the launcher does not initialise the runtime.
"""

import json
import subprocess
import sys
from collections.abc import Mapping

from flame.base.errors import UsageError


def addresses(env: Mapping[str, str]) -> list[str]:
    """Address of each GPU that a process of this environment sees, as in `/sys/bus/pci/devices`.

    Raises:
        UsageError: The GPU runtime fails.
    """
    import torch  # takes seconds, so not before the launcher's first checks

    if not (torch.version.cuda or torch.version.hip):
        return []
    run = subprocess.run(
        [sys.executable, "-m", "flame.machine.list_gpus"],
        env=dict(env),
        capture_output=True,
        text=True,
    )
    if run.returncode:
        reason = run.stderr.strip() or f"exit code {run.returncode}"
        raise UsageError(f"torch cannot list the GPUs: {reason.splitlines()[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Prints the GPUs that torch sees, as JSON."""
    import torch

    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            # torch does not give the function; 0 is the GPU, others are its audio or its partitions
            found.append(f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
