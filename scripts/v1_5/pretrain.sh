#!/usr/bin/env bash
# Stage 1: the projector learns to describe images; LLaVA-1.5's recipe. Everything can be set from the environment (see
# launch.sh) or by trailing flags:   T2V_LAYERS="[0,1,7,8,9,10,11,14]" bash scripts/v1_5/pretrain.sh --max_steps 100
# Images are cropped here; LLaVA pads them only from stage 2 on.
set -euo pipefail
GLOBAL_BATCH="${GLOBAL_BATCH:-256}"
BATCH="${BATCH:-32}"
ENGINE="${ENGINE:-configs/zero2.json}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --stage pretrain \
    --version plain \
    --data_path "${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
    --image_folder "${IMAGES:-playground/data/LLaVA-Pretrain/images}" \
    --image_aspect_ratio square \
    --output_dir "${OUTPUT:-checkpoints/vica-v1.5-$MODEL-pretrain}" \
    --num_train_epochs 1 \
    --learning_rate 1e-3 \
    --gradient_checkpointing True \
    --save_steps 500 \
    --report_to "${REPORT_TO:-none}" \
    "$@"
