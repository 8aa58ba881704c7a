#!/usr/bin/env bash
# Everything that only a GPU can tell of vogue, in under 9 minutes, without a network:
#
#     bash bench/gpu.sh [OUT]            # OUT: a folder, by default gpu-results; a JSON file for each section of gpu.py
#
# It needs Python 3.11 or newer with torch, triton, transformers, pytest and hypothesis (pytest-xdist makes it faster).
# What else there is comes from a folder of wheels, bench/wheels, which is made where there is a network:
#
#     download="python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
#     $download -d bench/wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1                  # the peers, 1 MB
#     $download -d bench/wheels omegaconf pydantic pydantic-core annotated-types datasets dill multiprocess \
#         math-verify latex2sympy2-extended hjson einops msgpack                               # for the whole training
#     DS_BUILD_OPS=0 python3 -m pip wheel --no-deps --no-build-isolation -w bench/wheels \
#         deepspeed==0.19.8 antlr4-python3-runtime==4.13.2             # these two come as source alone
#
# pydantic says by its own metadata which pydantic-core it takes. What isn't there is a line of the results.
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1
export PATH="$PWD/.venv/bin:$PATH"
python=$(command -v python3 || command -v python)
packages=""
if [ -d bench/wheels ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    for wheel in bench/wheels/*.whl; do # one by one, so that one that doesn't fit stops no other
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$packages" "$wheel" ||
            echo "$wheel can't be installed" >&2
    done
    packages=":$packages"
fi
export PYTHONPATH="$PWD:$PWD/kernels$packages${PYTHONPATH:+:$PYTHONPATH}"
"$python" bench/gpu.py "$@"
