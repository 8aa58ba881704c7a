#!/usr/bin/env bash
# Real images, a model from nothing, VOGUE: what `make demo` runs. Work that is done already is not done again;
# `rm -r runs/demo` starts over.
set -euo pipefail

out=runs/demo
[ -d $out/data ] || vogue data digits $out/data
[ -d $out/base ] || vogue warmstart $out/base
resume=$([ -d $out/vogue/checkpoints ] && echo --resume || true)
vogue train examples/digits/vogue.yaml $resume
vogue report $out/vogue
