#!/usr/bin/env bash
# MMBench in Chinese.   CKPT=folder-or-repository bash scripts/v1_5/eval/mmbench_cn.sh      See run.sh for more.
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
evaluate mmbench_cn "$@"
