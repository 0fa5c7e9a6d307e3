#!/usr/bin/env bash
# Sourced by the scripts beside it: `evaluate BENCHMARK FLAGS` asks all of a benchmark's questions and scores the answers.
#
#   CKPT=...             checkpoint folder or hub repository (default: playground/checkpoints/toy-vica, with the
#                        questions of the toy world, which is drawn into playground/toy/eval)
#   T2V_LAYERS="[0,1]"   layers in place of the checkpoint's
#   DATA=FOLDER          holds LLaVA's folders (default: playground/data/eval)
#   GPUS=8               processes on this machine (default: its GPUs; none: one process on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines (MASTER_PORT: 29500; on one: a free one)
#   PYTHON               interpreter (default: .venv's, else python3)
# Flags are those of `vica eval`, such as --limit 100, --variant dense, --hub, --out FOLDER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
source scripts/setup.sh
if [ -z "${PYTHON:-}" ] && ! python3 -c 'import torch, transformers' 2> /dev/null; then setup_venv; fi
find_python

evaluate() {
    local found processes data="${DATA:-}" starter=("$PYTHON")
    found="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    processes="${GPUS:-$((found > 0 ? found : 1))}"
    if [ -z "${CKPT:-}" ] && [ -z "$data" ]; then
        data=playground/toy/eval
        [ -d "$data" ] || "$PYTHON" -m vica.toy.benchmarks --out "$data" || [ -d "$data" ] # unless another script has drawn it meanwhile
    fi
    if [ "$processes" -gt 1 ] || [ "${NNODES:-1}" -gt 1 ]; then
        find_port
        starter+=(-m torch.distributed.run --nproc_per_node "$processes" --nnodes "${NNODES:-1}"
            --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}"
            --master_port "$MASTER_PORT")
    fi
    "${starter[@]}" -m vica.cli.main eval "$1" --model "${CKPT:-playground/checkpoints/toy-vica}" \
        ${data:+--data "$data"} "${@:2}"
}
