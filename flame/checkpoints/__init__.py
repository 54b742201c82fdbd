"""Checkpoints of a run: saving and loading, the folders `step-N`, and Hugging Face weights.

It may import `titan`, `data`, `models`, `config` and `base`.
"""
