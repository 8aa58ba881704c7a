#!/usr/bin/env bash
# The demo on five seeds, each from its own warm start, two at a time on one core each; prints a table.
#   bash examples/digits/seeds.sh [key=value ...]      for example method=grpo
set -euo pipefail

out=runs/seeds
name=$(IFS=_; echo "vogue${*:+_$*}" | tr -c 'a-zA-Z0-9=.\n' _)
[ -d $out/data ] || vogue data digits $out/data

run() {
    seed=$1; shift
    base=$out/$seed/base
    [ -d "$base" ] || vogue warmstart "$base" --seed "$seed" > "$out/warmstart-$seed.log" 2>&1
    [ -d "$out/$seed/$name/checkpoints" ] || vogue train examples/digits/vogue.yaml seed="$seed" model.path="$base" \
        data.train=$out/data/train.parquet data.test=$out/data/test.parquet data.test_limit=500 \
        trainer.output_dir="$out/$seed/$name" "$@" > "$out/$name-$seed.log" 2>&1
}
export -f run
export out name OMP_NUM_THREADS=1
seq 0 4 | xargs -P 2 -I{} bash -c 'run "$@"' _ {} "$@"

python - "$out" "$name" <<'PYTHON'
import json, sys
from pathlib import Path

out, name = sys.argv[1:]
show = lambda pass_at: "{:.1f}% [{:.1f}, {:.1f}]".format(*(100 * value for value in pass_at))
print(f"{name}\n\n| seed | pass@1 before | after | rise | pass@4 before | after |\n|---|---|---|---|---|---|")
for seed in range(5):
    rows = [json.loads(line) for line in (Path(out) / str(seed) / name / "evaluations.jsonl").read_text().splitlines()]
    before, after = rows[0], rows[-1]
    rise = 100 * (after["pass@1"][0] - before["pass@1"][0])
    cells = [show(before["pass@1"]), show(after["pass@1"]), f"{rise:+.1f}", show(before["pass@4"]), show(after["pass@4"])]
    print(f"| {seed} | " + " | ".join(cells) + " |")
PYTHON
