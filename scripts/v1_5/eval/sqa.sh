#!/usr/bin/env bash
# ScienceQA.   CKPT=folder-or-repository bash scripts/v1_5/eval/sqa.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate sqa "$@"
