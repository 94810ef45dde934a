# CPU:  docker build -t video-trl .
# CUDA: docker build -t video-trl --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= .
# Run:  docker run --rm -it -v "$PWD:/data" video-trl doctor
ARG BASE=ubuntu:24.04
FROM ${BASE}

# The environment that the tests pass in has Python 3.11; uv brings it, whatever the base has.
COPY --from=ghcr.io/astral-sh/uv:0.9.10 /uv /usr/local/bin/uv
ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_LINK_MODE=copy \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH
RUN uv venv --python 3.11 /opt/venv

WORKDIR /opt/video_trl
COPY .ci/constraints.txt .ci/constraints.txt
# Empty: the build of the package index, which brings CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN uv pip install --no-cache -c .ci/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

ARG EXTRAS=judges,remote,curation,evaluation,vote
COPY pyproject.toml README.md LICENSE ./
COPY video_trl video_trl
RUN uv pip install --no-cache -c .ci/constraints.txt ".[${EXTRAS}]" \
    && useradd --create-home --uid 10001 user

USER 10001
WORKDIR /data
ENTRYPOINT ["video-trl"]
CMD ["--help"]
