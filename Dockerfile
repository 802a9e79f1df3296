# CPU:   docker build -t rlkit .
# CUDA:  docker build -t rlkit --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 \
#            --build-arg EXTRAS=vllm,wandb,tensorboard --build-arg CONSTRAINTS= .
# Where pip's default torch is a CUDA build and a CPU one is wanted:
#        --build-arg PIP_FLAGS="--extra-index-url <PyTorch's CPU wheel index>"
# Run:   docker run --rm -v "$PWD:/work" rlkit train recipe=quickstart     (CUDA: with --gpus all)
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=wandb,tensorboard
ARG CONSTRAINTS="-c constraints-cpu.txt"
ARG PIP_FLAGS=""
# The CUDA base has no Python and gets the system's; the CPU base has its own. gcc and headers are for Triton's kernels.
RUN apt-get update \
 && apt-get install -y --no-install-recommends git libseccomp2 gcc libc6-dev \
 && (command -v python3 > /dev/null || apt-get install -y --no-install-recommends python3 python3-dev) \
 && (python3 -c "import ensurepip" || apt-get install -y --no-install-recommends python3-venv) \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/rlkit
ENV PATH=/opt/rlkit/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints-cpu.txt ./
COPY rlkit rlkit
COPY rewards rewards
COPY recipes recipes
RUN pip install --no-cache-dir ${PIP_FLAGS} ${CONSTRAINTS} ".[${EXTRAS}]"
WORKDIR /work
ENTRYPOINT ["rlkit"]
