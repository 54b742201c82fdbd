"""``python -m flame.machine.list_gpus``: the PCI addresses of the GPUs that a process sees, in torch's order, as JSON.

It asks the GPU runtime, so that visible devices, UUIDs, CUDA_DEVICE_ORDER and partitions have the same effect as in a
run. It does so in a separate process, so that the launcher does not initialise the runtime.
"""

import json
import subprocess
import sys
from collections.abc import Mapping

from flame.base.errors import UsageError

# torch's import from a busy network file system takes a minute, and 64 partitions take the runtime seconds
TIMEOUT_S = 300


def addresses(env: Mapping[str, str]) -> list[str]:
    """Address of each GPU that a process of this environment sees, as in `/sys/bus/pci/devices`.

    Neither amd-smi nor rocm-smi is asked, so it does not matter whether they are installed and work.

    Raises:
        UsageError: The GPU runtime fails or hangs.
    """
    import torch  # takes seconds, so not before the launcher's first checks

    if not (torch.version.cuda or torch.version.hip):
        return []
    process = subprocess.Popen(
        [sys.executable, "-m", "flame.machine.list_gpus"],
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # no wait for its end: a process that hangs in the driver does not end when it is killed
        process.kill()
        program = "rocminfo" if torch.version.hip else "nvidia-smi"
        raise UsageError(
            f"torch did not list the GPUs within {TIMEOUT_S} s: the GPU driver hangs, or torch cannot be imported; "
            f"`{program}` and `dmesg` may say why"
        ) from None
    if process.returncode:
        reason = err.strip() or f"exit code {process.returncode}"
        raise UsageError(f"torch cannot list the GPUs: {reason.splitlines()[-1]}")
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Prints the GPUs that torch sees, as JSON."""
    import torch

    found = []
    if torch.cuda.is_available():
        # before that, torch's ROCm build asks the library amdsmi for their number, which knows nothing of containers
        # and has counted 0 where HIP saw GPUs (pytorch issue 186516)
        torch.cuda.init()
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            # torch does not give the function; 0 is the GPU, others are its audio or its partitions
            found.append(f"{p.pci_domain_id:04x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
