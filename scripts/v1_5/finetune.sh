#!/usr/bin/env bash
# Stage 2: projector and language model learn to follow instructions; LLaVA-1.5's recipe. Everything can be set from the
# environment (see launch.sh) or by trailing flags:   T2V_LAYERS="[0,1,7,8,9,10,11,14]" bash scripts/v1_5/finetune.sh
set -euo pipefail
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"
BATCH="${BATCH:-16}"
ENGINE="${ENGINE:-configs/zero3.json}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --stage finetune \
    --version v1 \
    --data_path "${DATA:-playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-playground/data}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-checkpoints/vica-v1.5-$MODEL-pretrain/mm_projector.bin}" \
    --output_dir "${OUTPUT:-checkpoints/vica-v1.5-$MODEL}" \
    --num_train_epochs 1 \
    --learning_rate 2e-5 \
    --group_by_modality_length True \
    --gradient_checkpointing True \
    --save_steps 500 \
    --report_to "${REPORT_TO:-none}" \
    "$@"
