#!/usr/bin/env bash
# Sets up and runs the tests.   bash scripts/test.sh [pytest arguments]     e.g. -m "not slow", -k cache
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_venv dev
export HF_HUB_OFFLINE=1 # tests create all files that they need
exec .venv/bin/python -m pytest --numprocesses "${WORKERS:-2}" "$@"
