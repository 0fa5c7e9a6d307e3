#!/usr/bin/env bash
# MMBench.   CKPT=folder-or-repository bash scripts/v1_5/eval/mmbench.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate mmbench "$@"
