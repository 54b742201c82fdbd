"""An ablation of many runs: its file, checks, cost, processes, state and table of losses.

It may import every other room, and no program.
"""
