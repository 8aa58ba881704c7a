#!/usr/bin/env bash
# Everything that only a GPU can tell of vogue, in under 9 minutes, without a network:
#
#     bash bench/gpu.sh [OUT]            # gpu-results; OUT: a folder for a JSON file of each section of gpu.py
#
# It needs Python 3.11 or newer with torch, triton, transformers, pytest and hypothesis (pytest-xdist makes it faster).
# What else there is comes from a folder of wheels, bench/wheels, which is made where there is a network:
#
#     download="python3 -m pip download --no-deps -c constraints.txt --only-binary=:all: -d bench/wheels
#         --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64
#         --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
#     $download liger-kernel cut-cross-entropy                                                 # the peers, 1 MB
#     $download omegaconf pydantic pydantic-core annotated-types typing-inspection datasets dill multiprocess \
#         math-verify latex2sympy2-extended antlr4-python3-runtime hjson einops msgpack        # for whole trainings, 5 MB
#     DS_BUILD_OPS=0 python3 -m pip wheel --no-deps --no-build-isolation -c constraints.txt -w bench/wheels deepspeed
#
# (DeepSpeed comes as source, which needs a torch to become a wheel; with no operators built it fits any.) What isn't
# there is a line of the results.
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1
export PATH="$PWD/.venv/bin:$PATH"
python=$(command -v python3 || command -v python)
packages=""
if [ -d bench/wheels ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    install=("$python" -m pip install -q --no-index --no-deps --no-compile --target "$packages")
    "${install[@]}" bench/wheels/*.whl ||
        for wheel in bench/wheels/*.whl; do # one by one, so that one that doesn't fit stops no other
            "${install[@]}" --upgrade "$wheel" || echo "$wheel can't be installed" >&2
        done
    packages=":$packages"
fi
export PYTHONPATH="$PWD:$PWD/kernels$packages${PYTHONPATH:+:$PYTHONPATH}"
"$python" bench/gpu.py "$@"
