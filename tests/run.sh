#!/usr/bin/env bash
# All checks and tests: style, types, import directions, pytest. Works from any folder, on a machine with nothing but Python installed.
#   bash tests/run.sh                     everything
#   bash tests/run.sh -m long             the tests that are otherwise left out, for their time
#   bash tests/run.sh tests/test_x.py     arguments go to pytest, the other checks are left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
make_venv "[test]"
bin=.venv/bin
if [[ $# -eq 0 || "$*" == *slurm* || "$*" == *long* ]]; then
    bash tests/slurm/install.sh
fi
if [ $# -gt 0 ]; then
    exec $bin/python -m pytest "$@"
fi

checks() {
    set -e
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
}

# These mostly wait, for daemons and processes of others: they run beside all else, and their words come last.
beside=(tests/slurm tests/test_tuning_*.py tests/test_launch_doctor.py tests/test_launch_[ns]*.py)
said="$(mktemp -d)"
checks >"$said/checks" 2>&1 &
checking=$!
$bin/python -m pytest "${beside[@]}" >"$said/beside" 2>&1 &
testing=$!
trap 'kill $checking $testing 2>/dev/null || true; rm -rf "$said"' EXIT

code=0
echo "== pytest, but for ${beside[*]}"
$bin/python -m pytest "${beside[@]/#/--ignore=}" || code=$?
echo "== pytest ${beside[*]}"
wait $testing || code=$?
cat "$said/beside"
wait $checking || code=$?
cat "$said/checks"
exit $code
