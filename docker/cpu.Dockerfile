# What `make setup` makes, for training on CPUs. From the repository's root:
#
#   docker build -f docker/cpu.Dockerfile -t vogue:cpu .
#   docker run --rm -it -v "$PWD/runs:/vogue/runs" vogue:cpu make demo
#
# Where pip finds only CUDA builds of torch, give it PyTorch's CPU index: --build-arg PIP_EXTRA_INDEX_URL=...
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /vogue
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1

COPY . .
RUN make setup PYTHON=python

ENV PATH=/vogue/.venv/bin:$PATH
CMD ["vogue", "doctor"]
