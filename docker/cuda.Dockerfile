# Training on NVIDIA GPUs, by the commands of the README. From the repository's root:
#
#   docker build -f docker/cuda.Dockerfile -t vogue:cuda .
#   docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/vogue/runs" vogue:cuda vogue doctor
#
# It has not been run on a GPU yet. The base image has the CUDA toolkit, since DeepSpeed and Triton compile for the GPU
# when they first run; its version has to be one that the CUDA build of torch 2.13 works with.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /vogue
RUN python3 -m venv /opt/vogue
ENV PATH=/opt/vogue/bin:$PATH PIP_NO_CACHE_DIR=1

# torch first, and no isolation: DeepSpeed and the C++ kernels look at it while they build.
RUN pip install 'torch>=2.13,<2.14' cmake ninja
COPY . .
RUN pip install --no-build-isolation '.[gpu]'

CMD ["vogue", "doctor"]
