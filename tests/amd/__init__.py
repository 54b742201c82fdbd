"""Executes AMD machine code on a CPU, to test the Triton kernels as they are compiled for cards that are not there.

decode.py reads a code object, with the tables of the package tinygrad; memory.py holds registers, tensors and local
memory; scalar.py, vector.py and matrix.py give instructions their meaning; run.py schedules the waves of a launch;
offline_launches.py lets the project's launchers launch there.
"""
