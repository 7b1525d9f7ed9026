#!/usr/bin/env bash
# Fine-tunes RoBERTa large on RTE with delta-SAM, one process a GPU of several machines.
# Start it on each of them, with the same values. Arguments go to fairseq-train and win.
set -euo pipefail

DATA=${DATA:-RTE-bin}                        # made by python -m deltasam_fairseq.glue.prepare
CHECKPOINT=${CHECKPOINT:-roberta.large/model.pt}
SAVE_DIR=${SAVE_DIR:-checkpoints/rte}        # a folder that all machines see
NODES=${NODES:-2}
PROCESSES=${PROCESSES:-8}                    # of each machine, one a GPU
RENDEZVOUS=${RENDEZVOUS:?HOST:PORT}          # host name of one of the machines, a free port there
BATCH=${BATCH:-16}                           # sentences an update, all processes together
DEVICE=${DEVICE:---fp16}                     # --bf16, or --cpu
USER_DIR=${USER_DIR:-$(python -m deltasam_fairseq)}

torchrun --nnodes "$NODES" --nproc_per_node "$PROCESSES" \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "$(basename "$SAVE_DIR")" \
    "$(command -v fairseq-train)" "$DATA" \
    --user-dir "$USER_DIR" \
    --optimizer delta_sam_adam --sam-rho 0.02 --delta-sam-beta 5 \
    --finetune-from-model "$CHECKPOINT" --save-dir "$SAVE_DIR" "$DEVICE" \
    --task sentence_prediction --criterion sentence_prediction --num-classes 2 \
    --arch roberta_large --max-positions 512 --init-token 0 --separator-token 2 \
    --batch-size $((BATCH / PROCESSES / NODES)) --required-batch-size-multiple 1 \
    --adam-betas "(0.9, 0.98)" --adam-eps 1e-6 --weight-decay 0.1 --dropout 0.1 \
    --attention-dropout 0.1 --lr 2e-5 --lr-scheduler polynomial_decay --warmup-updates 122 \
    --total-num-update 2036 --max-update 2036 --max-epoch 10 --find-unused-parameters \
    --best-checkpoint-metric accuracy --maximize-best-checkpoint-metric --no-epoch-checkpoints \
    --fp16-init-scale 4 --threshold-loss-scale 1 --fp16-scale-window 128 \
    "$@"
