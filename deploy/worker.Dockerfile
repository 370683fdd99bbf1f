# A GPU worker, or a CPU one: the engine with torch, and the pocket checkpoint, so that it can work without a download.
# Build it from the repository's root: docker build -f deploy/worker.Dockerfile .
# To pin it by digest: python:3.11-slim@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# Arguments, not settings: pip sees them while the image is built, the image does not remember them. Empty means pip's own default.
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=
# A second index to find torch in. The default build of torch brings CUDA along, several gigabytes of it; a host without a GPU
# does with an index of CPU builds (their version, 2.13.0+cpu, satisfies the pin and is preferred to the plain one).
ARG TORCH_INDEX_URL=
# Packages of Debian that are added: models with compile_blocks need "gcc libc6-dev" on a GPU, "g++" on a CPU.
ARG APT_PACKAGES=

# The root file system is read-only in service, so bytecode is written now or never. Downloads by themselves are not a worker's
# business: what it serves is pinned in fleet.toml and lies on its disk.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp HF_HUB_OFFLINE=1
# A volume, for /tmp is lost with the container and may not hold programs.
ENV TORCHINDUCTOR_CACHE_DIR=/var/lib/darkroom/compiled/inductor TRITON_CACHE_DIR=/var/lib/darkroom/compiled/triton

WORKDIR /app
RUN if [ -n "$APT_PACKAGES" ]; then apt-get update && apt-get install -y --no-install-recommends $APT_PACKAGES \
    && rm -rf /var/lib/apt/lists/*; fi
COPY requirements/base.txt requirements/engine.txt requirements/
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements/engine.txt

# A number and not only a name: Kubernetes checks runAsNonRoot by the number.
RUN groupadd --system --gid 10001 darkroom \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin darkroom \
    && install -d -o 10001 -g 10001 /var/lib/darkroom/curves /var/lib/darkroom/weights /var/lib/darkroom/compiled

COPY pocket/checkpoint pocket/checkpoint
COPY settings.py celeryconfig.py fleet.toml ./
COPY deploy/health.py deploy/
COPY models models
COPY policy policy
COPY dispatch dispatch
COPY edges edges
COPY engine engine
COPY fleet fleet
COPY tasks tasks
# For `darkroom calibrate MODEL`, which must run where the device is.
COPY darkroom_client darkroom_client
COPY cli cli
# `darkroom` wherever one is; -P: that folder has no say in what is imported.
RUN printf '#!/bin/sh\nPYTHONPATH=/app exec python -P -m cli "$@"\n' > /usr/local/bin/darkroom && chmod 755 /usr/local/bin/darkroom
# A checkout with a strict umask must not become an image that its own user cannot read.
RUN chmod -R a+rX /app && PYTHONDONTWRITEBYTECODE= python -m compileall -q /app

# Where whoever builds it keeps its source: a URL, empty if nobody says one.
ARG SOURCE_URL=
LABEL org.opencontainers.image.title="darkroom-worker" \
      org.opencontainers.image.description="The worker of Darkroom, which renders images" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.licenses="Apache-2.0"

USER 10001:10001
CMD ["python", "-m", "fleet.worker"]
