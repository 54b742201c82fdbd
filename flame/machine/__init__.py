"""The machine a run starts on: NUMA groups, GPUs, CPU binding, ports, tested versions of torch and Triton.

It may import `base` alone, so that the launcher starts without torch.
"""
