"""The training loop: one optimizer step, spikes, lost processes, stop signals, random state, metrics.

It may import `run` and every room below it.
"""
