#!/usr/bin/env bash
# Sets up, builds a small model and asks it about a picture in all three variants. No download of weights or data.
#   bash scripts/quickstart.sh [--image F] [--question "..."]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_venv
exec .venv/bin/python -m vica.toy.quickstart "$@"
