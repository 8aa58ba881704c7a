#!/usr/bin/env bash
# The Triton kernels on one GPU, in under 8 minutes: correctness against float64, then time and memory beside others.
#
#     bash bench/gpu.sh [FILE.json]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

python - <<'EOF'
import sys, torch
if not torch.cuda.is_available():
    print(f"no GPU: torch {torch.__version__} sees none; nothing was tested or measured", file=sys.stderr)
    sys.exit(2)
EOF
python -m pytest tests/kernels -k triton -q -p no:cacheprovider --confcutdir tests/kernels
python bench/kernels.py --device cuda --errors --json "${1:-gpu.json}"
