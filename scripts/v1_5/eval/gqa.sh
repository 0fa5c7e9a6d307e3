#!/usr/bin/env bash
# GQA.   CKPT=folder-or-repository bash scripts/v1_5/eval/gqa.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate gqa "$@"
