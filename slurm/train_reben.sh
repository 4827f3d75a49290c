#!/usr/bin/env bash
# Train AdaGC on all GPUs of the allocation; saved and requeued before the time limit, at preemption and when a node is lost.
#   sbatch --account=A --partition=P slurm/train_reben.sh                          2 nodes, shards and run folder as below
#   sbatch --nodes=4 slurm/train_reben.sh optim.epochs=40 run.seed=1               other resources; keys of the recipe
#   bash slurm/train_reben.sh                                                      without Slurm: on this machine
#SBATCH --job-name=adagc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# GPUs: sbatch --gpus-per-node=8, where the partition does not give them by itself.
trap '' USR1 # until launch.job listens
set -euo pipefail

# ---- the site's block: edit it, or set these variables before sbatch ----
: "${ADAGC_SETUP:=}"                            # shell commands before the start: module load ..., source venv/bin/activate
: "${ADAGC_PYTHON:=}"                           # the Python with this package in it; by default .venv's of this checkout
: "${ADAGC_RECIPE:=reben_random}"               # or reben_dominant, aid_random, a YAML file
: "${ADAGC_SHARDS:=/data/reben-shards}"         # what slurm/shard_reben.sh wrote, on a file system that all nodes see
: "${ADAGC_RUN:=runs/${SLURM_JOB_NAME:-adagc}}" # the run's folder, on such a file system, too; --job-name gives another
: "${ADAGC_STEP_PYTHON:=}"                      # words for Python on the nodes: apptainer exec --nv --bind /data image.sif python
: "${ADAGC_CACHE:=}"                            # a folder on the nodes' own disks: shards are copied there ahead of need
: "${ADAGC_RANKS_PER_NODE:=}"                   # by default the node's GPUs, else 1
: "${ADAGC_JOB_OPTIONS:=}"                      # for launch.job: --max-restarts 50 --join-seconds 600 ...
# --------------------------------------------------------------------------

# Slurm runs a copy of this file: the checkout is where the job was submitted, or named
here="${ADAGC_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
eval "$ADAGC_SETUP"
python="${ADAGC_PYTHON:-$(command -v "$here/.venv/bin/python" || echo python3)}"
"$python" -c 'import launch, importlib.util as found; assert found.find_spec("torch")' 2>/dev/null || {
    echo "train_reben.sh: $python does not have adagc-dist: submit from the checkout with its .venv (bash tests/run.sh or launch/demo.sh" \
        "makes one), or set ADAGC_PYTHON or ADAGC_SETUP" >&2
    exit 2
}
# shellcheck disable=SC2086  # options are words
exec "$python" -m launch.job train "$ADAGC_RECIPE" data.shards="$ADAGC_SHARDS" run.dir="$ADAGC_RUN" \
    ${ADAGC_CACHE:+data.stage=true "data.cache=$ADAGC_CACHE"} "$@" \
    ${ADAGC_STEP_PYTHON:+--python "$ADAGC_STEP_PYTHON"} \
    ${ADAGC_RANKS_PER_NODE:+--nproc-per-node "$ADAGC_RANKS_PER_NODE"} $ADAGC_JOB_OPTIONS
