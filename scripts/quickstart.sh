#!/usr/bin/env bash
# Sets up, and asks the trained toy models of playground/checkpoints about pictures that they never saw, in all three
# variants. No download of weights or data.
#   bash scripts/quickstart.sh [--image F --question "..."]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_venv
exec .venv/bin/python -m scripts.toy.quickstart "$@"
