#!/bin/sh
# PeBR-R1 (arXiv 2509.13031): split by a model's own pass rate, learn to see on the easy problems, then to reason on the
# medium ones, by what TRAIN starts a training with. MODEL is one that answers under the four headings, CLIP a model of CLIP's kind, DATA has `keywords`.
set -e
MODEL=${1:?MODEL} CLIP=${2:?CLIP} DATA=${3:?DATA} OUT=${4:-runs/pebr_r1}
TRAIN=${TRAIN:-deepspeed --num_gpus 8 --module vogue.train}
RECIPE=$(dirname "$0")/pebr_r1.yaml
SCORER="reward.scorer={function: 'vogue.rewards.similarity:clip', options: {model: $CLIP}}"
vogue data split "$RECIPE" "data.train=$DATA" "model.path=$MODEL" --samples 8 --out "$OUT/split"
$TRAIN "$RECIPE" "model.path=$MODEL" "data.train=$OUT/split/easy.parquet" reward.design=pebr_perception "$SCORER" \
  rollout.prompts=560 trainer.updates=5 trainer.epochs=1 "trainer.output_dir=$OUT/first"
FIRST=$(ls -d "$OUT"/first/checkpoints/step_* | tail -n 1)
$TRAIN "$RECIPE" "model.path=$FIRST/hf" "data.train=$OUT/split/medium.parquet" "trainer.output_dir=$OUT/second"
