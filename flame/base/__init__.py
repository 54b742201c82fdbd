"""What every other room uses: errors, logging, command lines, files, locks, signals.

It may import torch and the standard library, and nothing else of `flame`.
"""
