#!/usr/bin/env bash
# Convert reBEN to shards on many nodes: tasks share nothing but the output folder, and the last one writes the manifest.
#   sbatch --account=A --partition=P slurm/shard_reben.sh                          16 tasks; --array=0-15%4: 4 at a time
#   sbatch --array=3 slurm/shard_reben.sh                                          one that failed: it goes on where it was
#   ADAGC_PARTS=4 sbatch --array=0-3 slurm/shard_reben.sh --on-error skip          another number; options of adagc shard
#   bash slurm/shard_reben.sh                                                      without Slurm: all of it, on this machine
# Requeued at preemption and when a node is lost. The shards are the same bytes as those of one machine.
#SBATCH --job-name=shard-reben
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -euo pipefail

# ---- the site's block: edit it, or set these variables before sbatch ----
: "${ADAGC_SETUP:=}"                    # shell commands before the start: module load ..., source venv/bin/activate
: "${ADAGC_PYTHON:=}"                   # the Python with this package in it; by default .venv's of this checkout
: "${REBEN_ROOT:=}"                     # folder with BigEarthNet-S2, Reference_Maps and metadata.parquet; or
: "${REBEN_ARCHIVES:=}"                 # as downloaded: each task reads them whole, so few tasks with many cores are best
: "${ADAGC_SHARDS:=/data/reben-shards}" # to be written: 79 GB, on a file system that all nodes see
: "${ADAGC_PARTS:=16}"                  # as many as the array's tasks
# --------------------------------------------------------------------------

refuse() {
    echo "shard_reben.sh: $1" >&2
    exit 2
}

[ -n "$REBEN_ROOT" ] || [ -n "$REBEN_ARCHIVES" ] ||
    refuse "set REBEN_ROOT (a tree) or REBEN_ARCHIVES (as downloaded), and ADAGC_SHARDS (to be written: $ADAGC_SHARDS)"
source=(${REBEN_ROOT:+--root "$REBEN_ROOT"} ${REBEN_ARCHIVES:+--archives "$REBEN_ARCHIVES"})

part=()
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # the number of tasks would not do: it is 1 where one is run again
    [ "$SLURM_ARRAY_TASK_MAX" -lt "$ADAGC_PARTS" ] ||
        refuse "the array goes to $SLURM_ARRAY_TASK_MAX, for $ADAGC_PARTS parts: ADAGC_PARTS=N sbatch --array=0-\$((N-1)) ..."
    part=(--part "$SLURM_ARRAY_TASK_ID/$ADAGC_PARTS")
fi

# Slurm runs a copy of this file: the checkout is where the job was submitted, or named
here="${ADAGC_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
eval "$ADAGC_SETUP"
python="${ADAGC_PYTHON:-$(command -v "$here/.venv/bin/python" || echo python3)}"
"$python" -c 'import launch, importlib.util as found; assert found.find_spec("rasterio")' 2>/dev/null || {
    echo "shard_reben.sh: $python does not have adagc-dist: submit from the checkout with its .venv (bash tests/run.sh or launch/demo.sh" \
        "makes one), or set ADAGC_PYTHON or ADAGC_SETUP" >&2
    exit 2
}
exec "$python" -m launch.cli shard reben "${source[@]}" --out "$ADAGC_SHARDS" "${part[@]}" \
    --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" "$@"
