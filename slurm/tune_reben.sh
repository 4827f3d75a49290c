#!/usr/bin/env bash
# Run a sweep, a comparison, or any command, on a Ray cluster over the allocation's nodes; told to save and requeued before the time limit.
#   sbatch --account=A --partition=P slurm/tune_reben.sh adagc tune reben_random data.shards=SHARDS --dir runs/tune-reben --resume
#   sbatch --nodes=4 slurm/tune_reben.sh adagc tune ... --trials 64                other resources; 2 nodes by default
#   ADAGC_SWEEP=DIR sbatch slurm/tune_reben.sh adagc compare reben data.shards=SHARDS --out DIR --gpus-per-trial 1 --resume
#   bash slurm/tune_reben.sh python my_sweep.py                                    without Slurm, and a command of your own
# `ray.init()` finds the cluster. The command is to end with 75 when SIGTERM has made it save, and to go on where it was when
# it is run again, as `adagc tune --resume` and `adagc compare --resume` do. It is run again as well when it or Ray was killed on any node.
#SBATCH --job-name=tune-reben
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# GPUs: sbatch --gpus-per-node=8, where the partition does not give them by itself.
trap '' USR1 # until tuning.cluster listens
set -euo pipefail

# ---- the site's block: edit it, or set these variables before sbatch ----
: "${ADAGC_SETUP:=}"                             # shell commands before the start: module load ..., source venv/bin/activate
: "${ADAGC_PYTHON:=}"                            # the Python with this package in it; by default .venv's of this checkout
: "${ADAGC_SWEEP:=runs/${SLURM_JOB_NAME:-tune}}" # the sweep's folder, seen by all nodes; --job-name gives another
: "${ADAGC_CLUSTER_OPTIONS:=}"                   # for tuning.cluster: --max-restarts 50 --max-idle 5 --join-seconds 600 ...
# --------------------------------------------------------------------------

[ $# -gt 0 ] || {
    echo "tune_reben.sh: name the sweep's command: sbatch slurm/tune_reben.sh adagc tune RECIPE --dir SWEEP" \
        "--resume" >&2
    exit 2
}
# Slurm runs a copy of this file: the checkout is where the job was submitted, or named
here="${ADAGC_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
eval "$ADAGC_SETUP"
python="${ADAGC_PYTHON:-$(command -v "$here/.venv/bin/python" || echo python3)}"
"$python" -c 'import tuning, importlib.util as found; assert found.find_spec("ray")' 2>/dev/null || {
    echo "tune_reben.sh: $python does not have adagc-dist: submit from the checkout with its .venv (bash tests/run.sh or launch/demo.sh" \
        "makes one), or set ADAGC_PYTHON or ADAGC_SETUP" >&2
    exit 2
}
PATH="$(dirname "$python"):$PATH" # the command's `python` is this one
# shellcheck disable=SC2086  # options are words
exec "$python" -m tuning.cluster --dir "$ADAGC_SWEEP" $ADAGC_CLUSTER_OPTIONS -- "$@"
