#!/usr/bin/env bash
# Trains a model: bash train.sh [--section.option value ...]; bash train.sh -h lists the flags.
# NGPU: processes on this machine, one a GPU (default 1; without a GPU, CPU processes).
# MASTER_PORT: port of this run, for several runs side by side (default: a free one).
set -euo pipefail
exec python -m flame.launch "$@"
