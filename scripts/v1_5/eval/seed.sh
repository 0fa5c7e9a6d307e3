#!/usr/bin/env bash
# SEED-Bench, images.   CKPT=folder-or-repository bash scripts/v1_5/eval/seed.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate seed "$@"
