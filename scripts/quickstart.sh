#!/usr/bin/env bash
# Sets up .venv, and asks the trained toy models of playground/checkpoints about pictures that they never saw, in all
# three variants. Downloads no weights and no data.
#   bash scripts/quickstart.sh [--image F --question "..."]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_venv
exec .venv/bin/python -m scripts.toy.quickstart "$@"
