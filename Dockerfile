# syntax=docker/dockerfile:1
# Kamiyo Webhooks. Build:  docker build -t kamiyo-webhooks .
# Run with DATABASE_URL, STRIPE_WEBHOOK_SECRET and ADMIN_API_KEY; compose.yaml and deploy/kubernetes show how.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/kamiyo
WORKDIR /src
# What changes seldom comes first: a change of ours builds only the last layer anew.
COPY requirements.txt requirements-otel.txt ./
# Traces: docker build --build-arg OTEL=yes
ARG OTEL=
RUN /opt/kamiyo/bin/pip install --require-hashes -r requirements.txt \
    && if [ -n "$OTEL" ]; then /opt/kamiyo/bin/pip install --require-hashes -r requirements-otel.txt; fi
COPY pyproject.toml requirements.in requirements-otel.in README.md ./
COPY kamiyo kamiyo
COPY api api
COPY database database
RUN /opt/kamiyo/bin/pip install --no-build-isolation --no-deps . \
    && /opt/kamiyo/bin/python -m compileall -q /opt/kamiyo/lib

FROM python:${PYTHON}-slim-bookworm
# Numbers, not names: Kubernetes can only tell from a number that it is not root.
RUN groupadd --gid 10001 kamiyo && useradd --uid 10001 --gid kamiyo --no-create-home --home-dir /app kamiyo
COPY --from=build /opt/kamiyo /opt/kamiyo
ENV PATH=/opt/kamiyo/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOST=0.0.0.0
# A handler module of your own is found here: COPY or mount it, and name it in KAMIYO_HANDLERS.
WORKDIR /app
USER 10001:10001
EXPOSE 8000
# The file system may be read-only; /tmp must be writable (several server processes share their metrics there).
# Asks nobody: a database that is away, or events that fail, are no reason to start this process anew. At the port that the
# server listens on, if the environment says it (docker run --env PORT=9000); a worker has a check of its own in compose.yaml.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('PORT') or '8000') + '/api/v1/webhooks/live', timeout=2)"]
# No shell in between: SIGTERM reaches the server, which stops in order.
ENTRYPOINT ["kamiyo"]
CMD ["serve"]
