#!/usr/bin/env bash
# Trains a model: bash train.sh [--section.option value ...]; bash train.sh -h lists the flags.
# HIP_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES: GPUs of this run, of one NUMA group (default: all);
#   -1 trains on the CPU.
# NGPU: processes on this machine, one per GPU, the first ones (default 1; without a GPU, CPU processes).
# MASTER_PORT: port of this run, for several runs side by side (default: a free one).
# NNODE, NODE_RANK, MASTER_ADDR: for a run over several machines, together with MASTER_PORT: their number,
#   this one's place from 0, and the address of machine 0. With Slurm: sbatch scripts/slurm.sh [flags].
set -euo pipefail
exec python -m flame.launch "$@"
