#!/usr/bin/env bash
# Trains over the machines of a Slurm job: sbatch [options of sbatch] scripts/slurm.sh [flags of train.sh]
# from the root of the repository, for example
#   sbatch --nodes=2 --time=48:00:00 scripts/slurm.sh --job.dump_folder exp/softpick_1B --model.config ...
# One task per machine starts train.sh, which checks that machine's GPUs. Two minutes before the time limit the
# run saves and stops, and the job goes back to the queue, where the same command continues the run.
#SBATCH --job-name=flame
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
set -euo pipefail

: "${SLURM_JOB_ID:?start this script with sbatch}"
cd "$SLURM_SUBMIT_DIR"
export NNODE=$SLURM_JOB_NUM_NODES
export NGPU=${NGPU:-${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node, or set NGPU}}
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR
# jobs that share a machine differ in their numbers; train.sh refuses a port that is taken all the same
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

stopped=no interrupted=no
# to the tasks and not to srun, which answers SIGTERM by killing them
trap 'stopped=yes interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# Slurm's own end of the job reaches the tasks without this script
trap 'interrupted=yes' TERM

# --cpu-bind: train.sh binds to the right CPUs itself, and srun may leave one task one CPU.
# --wait, --kill-on-bad-exit: the first machine may export while the others are done, and a machine that stops
# must not take another one with it that is still saving.
# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=600 \
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash train.sh "$@"' train.sh "$@" &
step=$!
# a signal to this script ends `wait` before srun ends
while true; do
    interrupted=no code=0
    wait "$step" || code=$?
    [ "$interrupted" = yes ] || break
done

# 128 + SIGTERM: what train.sh returns when it has saved and stopped
if [ "$stopped" = yes ] && [ "$code" = 143 ]; then
    if scontrol requeue "$SLURM_JOB_ID"; then
        echo "saved and back in the queue: job $SLURM_JOB_ID continues the run"
    else
        echo "saved; to continue the run: sbatch scripts/slurm.sh $*"
    fi
fi
exit "$code"
