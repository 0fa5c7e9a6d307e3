#!/usr/bin/env bash
# POPE.   CKPT=folder-or-repository bash scripts/v1_5/eval/pope.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate pope "$@"
