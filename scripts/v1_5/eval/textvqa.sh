#!/usr/bin/env bash
# TextVQA.   CKPT=folder-or-repository bash scripts/v1_5/eval/textvqa.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate textvqa "$@"
