#!/usr/bin/env bash
# Trains a finished model on a task of your own: CKPT names the model, DATA and IMAGES the samples. Everything else can be
# set from the environment (see launch.sh) or by trailing flags. The model keeps its layers and prefix rule unless
# T2V_LAYERS or CONFIG names others: a file of configs/ would rewire a model that was trained with other layers.
#   CKPT=checkpoints/vica-v1.5-7b DATA=mine.json IMAGES=pictures bash scripts/v1_5/finetune_task.sh
set -euo pipefail
CONFIG="${CONFIG:-}"
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"
BATCH="${BATCH:-16}"
ENGINE="${ENGINE:-configs/zero3.json}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --stage finetune \
    --version v1 \
    --model_name_or_path "${CKPT:-checkpoints/vica-v1.5-$MODEL}" \
    --data_path "${DATA:?names the samples, a file in the format of LLaVA}" \
    --image_folder "${IMAGES:?names the folder of their images}" \
    --output_dir "${OUTPUT:-checkpoints/vica-v1.5-$MODEL-task}" \
    --num_train_epochs 1 \
    --learning_rate 2e-5 \
    --group_by_modality_length True \
    --gradient_checkpointing True \
    --save_steps 500 \
    --report_to "${REPORT_TO:-none}" \
    "$@"
