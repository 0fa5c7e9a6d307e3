#!/usr/bin/env bash
# Runs the whole recipe in miniature: draws a world, makes a tower and a language model for it, runs both training stages
# with the scripts of v1_5/ for dense and for ViCA, and asks each the questions of a test world.
#   bash scripts/toy.sh                     on an H200: 15 minutes for world and base, then 20 for six parallel runs
#   RUNS="vica dense" SEEDS=0 EPOCHS=2 bash scripts/toy.sh
#
#   RUNS     any of: vica (configs/toy.json's layers), dense, random (as many random layers), blind (no layers)
#   SEEDS    of the training; world and base stay the same                                (default: 0 1 2)
#   JOBS     parallel runs on each card: a single one leaves most of it idle              (default: 4)
#   PICTURES, EPOCHS, FOLDER                                      (default: 160000, 4, playground/toy)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CONFIG=configs/toy.json ENGINE=none GLOBAL_BATCH=128 BATCH=128 GPUS=1 OMP_NUM_THREADS=1
FOLDER="${FOLDER:-playground/toy}" RUNS="${RUNS:-vica dense random blind}" SEEDS="${SEEDS:-0 1 2}" JOBS="${JOBS:-4}"
source scripts/setup.sh
find_python

[ -d "$FOLDER/world" ] || "$PYTHON" -m vica.toy.write --folder "$FOLDER/world" --train "${PICTURES:-160000}"
[ -d "$FOLDER/base/tower" ] && [ -d "$FOLDER/base/llm" ] || "$PYTHON" -m scripts.toy.base --out "$FOLDER/base"

layers() { # prints the layers of a run (name, seed) as JSON
    "$PYTHON" - "$1" "$2" "$CONFIG" "$FOLDER/base/llm/config.json" <<'PYTHON'
import json, random, sys

name, seed, config, language_model = sys.argv[1:]
chosen = json.load(open(config))["t2v_layers"]
depth = json.load(open(language_model))["num_hidden_layers"]
others = [layer for layer in range(depth) if layer not in chosen]
print({"vica": chosen, "random": sorted(random.Random(seed).sample(others, len(chosen)))}.get(name, []))
PYTHON
}

train() { # name seed: runs both stages and the test, and resumes from existing files
    local out="$FOLDER/runs/$1-$2" variant=accel common
    [ "$1" = dense ] && variant=dense
    T2V_LAYERS="$(layers "$1" "$2")"
    export T2V_LAYERS
    common=(--variant "$variant" --seed "$2" --model_name_or_path "$FOLDER/base/llm" --vision_tower "$FOLDER/base/tower"
        --gradient_checkpointing False --group_by_modality_length False --logging_steps 10 --save_steps 250 --save_total_limit 1
        --disable_tqdm True)
    mkdir -p "$out"
    [ -f "$out/projector/mm_projector.bin" ] || DATA="$FOLDER/world/pretrain.json" IMAGES="$FOLDER/world/images" \
        OUTPUT="$out/projector" bash scripts/v1_5/pretrain.sh "${common[@]}" >> "$out/pretrain.log" 2>&1
    [ -f "$out/model/config.json" ] || DATA="$FOLDER/world/finetune.json" IMAGES="$FOLDER/world/images" \
        PROJECTOR="$out/projector" OUTPUT="$out/model" bash scripts/v1_5/finetune.sh "${common[@]}" \
        --learning_rate 1e-3 --num_train_epochs "${EPOCHS:-4}" >> "$out/finetune.log" 2>&1
    [ -f "$out/score.json" ] || T2V_LAYERS='' "$PYTHON" -m scripts.toy.evaluate "$out/model" --world "$FOLDER/world" \
        --json "$out/score.json" > "$out/score.txt"
    echo "$1, seed $2, layers $T2V_LAYERS: $(tail -n 1 "$out/score.txt")"
}

cards="${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd, || true)}"
IFS=, read -ra cards <<< "${cards:-none}"
pids=()
for seed in $SEEDS; do
    for name in $RUNS; do
        if [ "$(jobs -rp | wc -l)" -ge $((JOBS * ${#cards[@]})) ]; then wait -n; fi
        CUDA_VISIBLE_DEVICES="${cards[$((${#pids[@]} % ${#cards[@]}))]/none/}" train "$name" "$seed" &
        pids+=($!)
    done
done
for pid in "${pids[@]}"; do wait "$pid"; done
"$PYTHON" -m scripts.toy.claim "$FOLDER/runs" --out "$FOLDER/claim"
