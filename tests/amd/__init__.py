"""Executes AMD machine code on a CPU, to test the Triton kernels as they are compiled for cards that are not there.

decode.py reads a code object, with tables of the package tinygrad. registers.py and memory.py hold the state. access.py,
exchange.py, scalar.py, vector.py and matrix.py give instructions their meaning; run.py runs a launch.
offline_launches.py connects the launchers to it. docs/softpick/AMD.md says what was executed.
"""
