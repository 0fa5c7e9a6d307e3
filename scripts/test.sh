#!/usr/bin/env bash
# Sets up and runs the tests.
#   bash scripts/test.sh                      everything
#   bash scripts/test.sh core                 what the model means, in less than a minute
#   bash scripts/test.sh [pytest arguments]   e.g. -m "not slow", -k cache, tests/engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_venv dev
export HF_HUB_OFFLINE=1 # tests create all files that they need
tier=()
if [ "${1:-}" = core ]; then
    tier=(-m core tests/core)
    shift
fi
exec .venv/bin/python -m pytest --numprocesses "${WORKERS:-2}" --dist worksteal ${tier[@]+"${tier[@]}"} "$@"
