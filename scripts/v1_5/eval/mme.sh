#!/usr/bin/env bash
# MME.   CKPT=folder-or-repository bash scripts/v1_5/eval/mme.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate mme "$@"
