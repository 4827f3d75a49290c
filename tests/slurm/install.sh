#!/usr/bin/env bash
# Installs what tests/slurm needs (Slurm's daemons, munge, shellcheck) where root and apt are there; elsewhere says what is skipped.
# None of the services is started: the tests run daemons of their own.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

lacking() {
    local name
    for name in slurmctld slurmd sbatch srun munged shellcheck ip nsenter setpriv; do
        command -v "$name" >/dev/null || printf ' %s' "$name"
    done
}

install_packages() {
    local packages=(slurmctld slurmd slurm-client munge shellcheck iproute2 util-linux)
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" # "not allowed": what a package's installation would start
        chmod +x "$policy"
        # shellcheck disable=SC2064 # the path as it is now
        trap "rm -f '$policy'" EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install --yes --quiet=2 --no-install-recommends "${packages[@]}")
    "${install[@]}" || { apt-get update --quiet=2 && "${install[@]}"; }
}

[ -n "$(lacking)" ] || exit 0
echo "== installing Slurm, munge and shellcheck for tests/slurm"
if [ "$(id -u)" -ne 0 ]; then
    reason="not root"
elif ! command -v apt-get >/dev/null; then
    reason="no apt-get"
elif ! output="$(install_packages 2>&1)"; then
    reason="apt-get failed: $(tail -n 3 <<<"$output")"
fi
if [ -n "$(lacking)" ]; then
    echo "!! NOT INSTALLED:$(lacking) (${reason:-apt-get did not bring them}); the tests that need them WILL BE SKIPPED" >&2
fi
