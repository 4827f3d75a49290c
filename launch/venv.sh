#!/usr/bin/env bash
# Sourced by demo.sh and tests/run.sh: makes or reuses .venv in the project's root, with this package and its dependencies in it.
# Usage: make_venv EXTRA   (EXTRA: "" or "[test]"). Installs again only when setup.cfg or pyproject.toml have changed.

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3.10 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python of version 3.10 or newer found: install one, or name it with PYTHON=/path/to/python" >&2
    return 1
}

make_venv() {
    local extra="$1" python stamp wanted
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        echo "== making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || {
            rm -rf .venv
            echo "cannot make a virtual environment: on Debian and Ubuntu, apt-get install python3-venv" >&2
            return 1
        }
    fi
    stamp=".venv/.installed${extra//[^a-z]/-}"
    wanted="$(cat setup.cfg pyproject.toml | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing adagc-dist$extra and its dependencies (once: 6 to 7 GB with CUDA's libraries, 2 to 5 minutes)"
        .venv/bin/python -m pip install --quiet --editable ".$extra"
        echo "$wanted" >"$stamp"
    fi
}
