# Everything but pixels: gateway, results, sweeper, Flower, migrations and the command line. No torch in here.
# Build it from the repository's root: docker build -f deploy/api.Dockerfile .
# To pin it by digest: python:3.11-slim@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

# Arguments, not settings: pip sees them while the image is built, the image does not remember them. Empty means pip's own default.
ARG PIP_INDEX_URL=
ARG PIP_FIND_LINKS=

# The root file system is read-only in service, so bytecode is written now or never.
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp

WORKDIR /app
COPY requirements/base.txt requirements/
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore -r requirements/base.txt

# A number and not only a name: Kubernetes checks runAsNonRoot by the number.
RUN groupadd --system --gid 10001 darkroom \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin darkroom

COPY settings.py celeryconfig.py fleet.toml ./
COPY deploy/gunicorn.conf.py deploy/connections.py deploy/health.py deploy/
COPY models models
COPY migrations migrations
COPY policy policy
COPY dispatch dispatch
COPY edges edges
COPY fleet fleet
COPY tasks tasks
COPY app app
COPY darkroom_client darkroom_client
COPY cli cli
# `darkroom` wherever one is; -P: that folder has no say in what is imported.
RUN printf '#!/bin/sh\nPYTHONPATH=/app exec python -P -m cli "$@"\n' > /usr/local/bin/darkroom && chmod 755 /usr/local/bin/darkroom
# A checkout with a strict umask must not become an image that its own user cannot read.
RUN chmod -R a+rX /app && PYTHONDONTWRITEBYTECODE= python -m compileall -q /app

# Where whoever builds it keeps its source: a URL, empty if nobody says one.
ARG SOURCE_URL=
LABEL org.opencontainers.image.title="darkroom-api" \
      org.opencontainers.image.description="Gateway, results, sweeper, webhooks, Flower, migrations and command line of Darkroom" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.source="${SOURCE_URL}" \
      org.opencontainers.image.licenses="Apache-2.0"

USER 10001:10001
CMD ["python", "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py", "app.wsgi:application"]
