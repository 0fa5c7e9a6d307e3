#!/usr/bin/env bash
# Stage 2 with adapters on the language model instead of all its weights. `vica convert OUTPUT DST --to vica` merges them.
# Everything can be set from the environment (see launch.sh) or by trailing flags.
set -euo pipefail
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"
BATCH="${BATCH:-16}"
ENGINE="${ENGINE:-configs/zero3.json}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --stage finetune \
    --version v1 \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --data_path "${DATA:-playground/data/llava_v1_5_mix665k.json}" \
    --image_folder "${IMAGES:-playground/data}" \
    --pretrain_mm_mlp_adapter "${PROJECTOR:-checkpoints/vica-v1.5-$MODEL-pretrain/mm_projector.bin}" \
    --output_dir "${OUTPUT:-checkpoints/vica-v1.5-$MODEL-lora}" \
    --num_train_epochs 1 \
    --learning_rate 2e-4 \
    --group_by_modality_length True \
    --gradient_checkpointing True \
    --save_steps 500 \
    --report_to "${REPORT_TO:-none}" \
    "$@"
