#!/usr/bin/env bash
# From a fresh clone to a table in one command: makes .venv, writes a synthetic reBEN tree, shards it, trains the assume-negative baseline
# and AdaGC on two ranks (or one per GPU), evaluates both. About 10 minutes on 2 CPU cores; started again, it goes on where it was stopped.
#   bash launch/demo.sh          results in demo/
#   bash launch/demo.sh 1        the same with seed 1 (new data, labels, weights), results in demo/seed1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

seed="${1:-0}"
case "$seed" in '' | *[!0-9]*) echo "usage: bash launch/demo.sh [SEED]   (a number, not '$seed')" >&2; exit 2 ;; esac
folder="demo$([ "$seed" = 0 ] || echo "/seed$seed")"
patches=2000

make_venv ""
adagc=.venv/bin/adagc
ranks="$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')"

echo "== 1/4 a synthetic reBEN tree of $patches patches in $folder/tree (made data, for trying things out)"
$adagc synth --out "$folder/tree" --patches "$patches" --seed "$seed"

echo "== 2/4 WebDataset shards in $folder/shards"
$adagc shard reben --root "$folder/tree" --out "$folder/shards" --seed "$seed"

train() { # NAME: one run of method NAME, unless it has finished
    local run="$folder/runs/$1"
    if grep -qs '"finished"' "$run/status.json"; then
        echo "$run has finished already"
        return
    fi
    $adagc train demo method.name="$1" data.shards="$folder/shards" run.dir="$run" run.seed="$seed" spml.seed="$seed" \
        --nproc-per-node "$ranks"
}
echo "== 3/4 training on $ranks rank(s): assume-negative (AN), then AdaGC"
train an
train adagc

echo "== 4/4 evaluation on the test split, and of the labels recovered on the training split"
$adagc evaluate "$folder/runs/an" "$folder/runs/adagc" --recovered --nproc-per-node "$ranks"
echo
echo "Curves of both runs:  .venv/bin/tensorboard --logdir $folder/runs"
