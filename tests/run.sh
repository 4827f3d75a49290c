#!/usr/bin/env bash
# All checks and tests: style, types, import directions, pytest. Works from any folder, on a machine with nothing but Python installed.
#   bash tests/run.sh                     everything
#   bash tests/run.sh tests/test_x.py     arguments go to pytest, the other checks are left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv "[test]"
bin=.venv/bin
if [ $# -eq 0 ]; then
    echo "== ruff"
    $bin/ruff check .
    $bin/ruff format --check .
    echo "== mypy"
    $bin/mypy
    echo "== import directions"
    $bin/lint-imports
fi
if [[ $# -eq 0 || "$*" == *slurm* ]]; then
    bash tests/slurm/install.sh
fi
if [ $# -eq 0 ] && command -v shellcheck >/dev/null; then
    echo "== shellcheck"
    shellcheck --external-sources ./*/*.sh tests/slurm/*.sh
fi
echo "== pytest"
exec $bin/python -m pytest "$@"
