#!/bin/sh
# PeBR-R1 (arXiv 2509.13031): split by a model's own pass rate, learn to see on the easy problems, then to reason on the
# medium ones. MODEL is one that answers under the four headings, CLIP a model of CLIP's kind, DATA has `keywords`.
set -e
MODEL=${1:?MODEL} CLIP=${2:?CLIP} DATA=${3:?DATA} OUT=${4:-runs/pebr_r1}
SCORER="reward.scorer={function: 'vogue.rewards.similarity:clip', options: {model: $CLIP}}"
vogue data split "$DATA" "model.path=$MODEL" reward.design=pebr_reasoning rollout.temperature=1.2 \
  --samples 8 --out "$OUT/split"
vogue train method=grpo "model.path=$MODEL" "data.train=$OUT/split/easy.parquet" reward.design=pebr_perception \
  "$SCORER" "trainer.output_dir=$OUT/first"
FIRST=$(ls -d "$OUT"/first/checkpoints/step_* | tail -n 1)
vogue train method=grpo "model.path=$FIRST/hf" "data.train=$OUT/split/medium.parquet" reward.design=pebr_reasoning \
  "trainer.output_dir=$OUT/second"
