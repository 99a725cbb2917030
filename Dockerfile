# One image for training, conversion and serving. docs/docker.md says how it is built and run.
# Layers go from what changes least to what changes most: system, torch, kernels, the other packages, this one.

ARG BASE=nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# A compiler and Python's headers are wanted at run time, too: Triton compiles its launchers.
RUN apt-get update -q \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      build-essential ca-certificates curl git ninja-build tini python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

ARG TORCH=2.11.0
RUN pip install --quiet torch==${TORCH} setuptools==80.9.0 wheel==0.45.1 packaging==25.0

# The kernels are built here for these GPU architectures: 80 A100, 90 H100 and H200, 100 B200, 120 RTX PRO 6000.
# With an empty list there are none, and everything runs on PyTorch alone.
ARG CUDA_ARCHS="80 90 100"
ARG MAX_JOBS=8
ARG CAUSAL_CONV1D=1.7.0
ARG MAMBA_SSM=2.3.2.post1
ARG TRANSFORMER_ENGINE=2.20.2
ARG FLA_CORE=0.5.2
# Their own lists of architectures are fixed, so this compiler, which torch's builds ask for, takes ours for them.
RUN { echo '#!/bin/bash'; \
      echo 'words=(); for arch in $CUDA_ARCHS; do words+=(-gencode "arch=compute_$arch,code=sm_$arch"); done'; \
      echo 'while (($#)); do case "$1" in'; \
      echo '  (-gencode) shift 2 ;; (-gencode=*) shift ;; (*) words+=("$1"); shift ;;'; \
      echo 'esac; done'; \
      echo 'exec "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" "${words[@]}"'; \
    } > /usr/local/bin/nvcc-of-archs && chmod 755 /usr/local/bin/nvcc-of-archs
RUN [[ -z "$CUDA_ARCHS" ]] || CUDA_ARCHS="$CUDA_ARCHS" MAX_JOBS="$MAX_JOBS" \
    PYTORCH_NVCC=/usr/local/bin/nvcc-of-archs CAUSAL_CONV1D_FORCE_BUILD=TRUE \
    pip install --no-build-isolation --no-deps --no-binary causal-conv1d causal-conv1d==${CAUSAL_CONV1D}
RUN [[ -z "$CUDA_ARCHS" ]] || CUDA_ARCHS="$CUDA_ARCHS" MAX_JOBS="$MAX_JOBS" \
    PYTORCH_NVCC=/usr/local/bin/nvcc-of-archs MAMBA_FORCE_BUILD=TRUE \
    pip install --no-build-isolation --no-deps --no-binary mamba-ssm mamba-ssm==${MAMBA_SSM}
# Its kernels come compiled; what binds them to torch is compiled here.
RUN [[ -z "$CUDA_ARCHS" ]] || MAX_JOBS="$MAX_JOBS" \
    pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}"
# Kernels in Triton, for gated delta nets: nothing is compiled here.
RUN [[ -z "$CUDA_ARCHS" ]] || pip install "fla-core[cuda]==${FLA_CORE}"

WORKDIR /opt/hybrid-recipes
# The packages that it needs, from its own list: this layer is made anew when the list changes, not when the code does.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir hybrid recipes converters cli && touch {hybrid,recipes,converters,cli}/__init__.py \
 && pip install --quiet --no-build-isolation ".[data]" && pip uninstall --quiet -y hybrid-recipes \
 && rm -rf hybrid recipes converters cli build *.egg-info

COPY hybrid hybrid
COPY recipes recipes
COPY converters converters
COPY cli cli
RUN pip install --quiet --no-build-isolation --no-deps . && rm -rf build *.egg-info

RUN useradd --create-home --uid 10001 hybrid && mkdir /work && chown hybrid /work
USER hybrid
WORKDIR /work
EXPOSE 8000

# Of `hybrid serve` alone: a container that does anything else is healthy as long as it runs.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s --retries=3 \
  CMD if tr '\0' ' ' < /proc/1/cmdline | grep -q ' serve '; \
      then curl --fail --silent --output /dev/null "http://127.0.0.1:${PORT:-8000}/health"; fi

# tini is process 1: it passes signals on and takes up what has ended.
ENTRYPOINT ["tini", "-g", "--", "hybrid"]
CMD ["--help"]
