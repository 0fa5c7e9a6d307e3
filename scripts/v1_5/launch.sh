#!/usr/bin/env bash
# Sourced by the training scripts: `launch FLAGS` starts vica.train on all GPUs of this machine, or of several.
# Relative paths, also those in flags, start from the repository.
#
#   MODEL=3b|7b|13b      picks configs/vica-llava-1.5-$MODEL.json: backbone, tower, layers, prefix rule
#   CONFIG=FILE          another file of that kind; none if it is set and empty
#   T2V_LAYERS="[0,1]"   layers in place of the file's
#   GPUS=8               processes on this machine            (default: its GPUs; none: one process on the CPU)
#   GLOBAL_BATCH, BATCH  samples a step, and samples of one process in one pass; gradients accumulate over passes
#   ENGINE=FILE|none     DeepSpeed's settings                 (default: the script's choice; none without a GPU)
#   LAUNCHER=torchrun|deepspeed
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines, by torchrun on each (port: 29500; on one: a free one)
#   HOSTFILE=FILE        several machines, by DeepSpeed's launcher on one of them: a process for each slot
#   PYTHON               interpreter                          (default: .venv's, else python3)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODEL="${MODEL:-7b}"
CONFIG="${CONFIG-configs/vica-llava-1.5-$MODEL.json}"
if [ -n "$CONFIG" ] && [ ! -f "$CONFIG" ]; then
    echo "MODEL is '$MODEL': there is no $CONFIG; known: $(cd configs && echo vica-llava-1.5-*.json)" >&2
    exit 1
fi
source scripts/setup.sh
find_python

count_slots() { # prints the slots of HOSTFILE: GLOBAL_BATCH counts all machines
    local slots
    slots="$(sed -nE 's/^[[:space:]]*[^#[:space:]]+[[:space:]]+slots=([0-9]+).*/+ \1/p' "$HOSTFILE")" || return 1
    if [ -z "$slots" ]; then
        echo "HOSTFILE is '$HOSTFILE': no line of it reads like 'machine slots=8'" >&2
        return 1
    fi
    echo $((slots))
}

check_counts() {
    local name
    for name in GPUS NNODES BATCH GLOBAL_BATCH; do
        if [[ ! ${!name:-1} =~ ^[1-9][0-9]*$ ]]; then
            echo "$name is '${!name}'; it must be a whole number from 1" >&2
            return 1
        fi
    done
}

launch() {
    check_counts || return 1
    local found nodes="${NNODES:-1}" flags=() starter=()
    if ! found="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)"; then
        found="$("$PYTHON" -c 'import torch' 2>&1 || true)"
        echo "$PYTHON has no torch (${found##*$'\n'}): pip install -e '.[train]', or let PYTHON name another" >&2
        return 1
    fi
    local processes="${GPUS:-$((found > 0 ? found : 1))}"
    local batch="${BATCH:?}" all=$((processes * nodes)) steps
    if [ -n "${HOSTFILE:-}" ]; then all="$(count_slots)" || return 1; fi
    steps=$((GLOBAL_BATCH / (BATCH * all)))
    if [ $((steps * batch * all)) -ne "$GLOBAL_BATCH" ]; then
        echo "GLOBAL_BATCH=$GLOBAL_BATCH is no multiple of BATCH=$batch x $all processes" >&2
        return 1
    fi
    flags=(--per_device_train_batch_size "$batch" --gradient_accumulation_steps "$steps")
    if [ -n "$CONFIG" ]; then flags+=(--config "$CONFIG"); fi
    if [ -n "${T2V_LAYERS:-}" ]; then flags+=(--t2v_layers "$T2V_LAYERS"); fi
    if [ "$found" -gt 0 ]; then flags+=(--bf16 True --tf32 True); else flags+=(--use_cpu True) ENGINE=none; fi
    if [ "${ENGINE:-none}" != none ]; then flags+=(--deepspeed "$ENGINE"); fi

    if [ -n "${HOSTFILE:-}" ] || [ "${LAUNCHER:-torchrun}" = deepspeed ]; then
        find_port
        local machines=(--num_gpus "$processes")
        if [ -n "${HOSTFILE:-}" ]; then machines=(--hostfile "$HOSTFILE"); fi
        starter=("$(dirname "$PYTHON")/deepspeed" "${machines[@]}" --master_port "$MASTER_PORT" --module vica.train)
    elif [ "$processes" -eq 1 ] && [ "$nodes" -eq 1 ] && [ "${ENGINE:-none}" = none ]; then # DeepSpeed needs a launcher even for one process
        starter=("$PYTHON" -m vica.train)
    else
        find_port
        starter=("$PYTHON" -m torch.distributed.run --nproc_per_node "$processes" --nnodes "$nodes"
            --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT" -m vica.train)
    fi
    "${starter[@]}" "${flags[@]}" "$@"
}
