#!/usr/bin/env bash
# VQAv2.   CKPT=folder-or-repository bash scripts/v1_5/eval/vqav2.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate vqav2 "$@"
