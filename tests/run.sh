#!/usr/bin/env bash
# All checks and tests: style, types, import directions, pytest. Works from any folder, on a machine with nothing but Python installed.
#   bash tests/run.sh                     everything
#   bash tests/run.sh tests/test_x.py     arguments go to pytest, the other checks are left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv "[test]"
bin=.venv/bin
if [[ $# -eq 0 || "$*" == *slurm* ]]; then
    bash tests/slurm/install.sh
fi
if [ $# -gt 0 ]; then
    exec $bin/python -m pytest "$@"
fi

# These mostly wait, for daemons and processes of others: they run beside all else, and their words come last.
beside=(tests/slurm tests/test_tuning_*.py tests/test_launch_[dns]*.py)
said="$(mktemp)"
$bin/python -m pytest "${beside[@]}" >"$said" 2>&1 &
trap 'kill $! 2>/dev/null || true; rm -f "$said"' EXIT

echo "== ruff"
$bin/ruff check .
$bin/ruff format --check .
echo "== mypy"
$bin/mypy
echo "== import directions"
$bin/lint-imports
if command -v shellcheck >/dev/null; then
    echo "== shellcheck"
    shellcheck --external-sources ./*/*.sh tests/slurm/*.sh
fi
echo "== pytest, but for ${beside[*]}"
code=0
$bin/python -m pytest "${beside[@]/#/--ignore=}" || code=$?
echo "== pytest ${beside[*]}"
wait $! || code=$?
cat "$said"
exit $code
