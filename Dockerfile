# Every wheel is made in the first stage, so that the image has no compiler and no build tool. The base
# image is given by its digest, the packages by hashes: `scripts/lock` writes them.
FROM python:3.12.14-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea AS build
WORKDIR /source
COPY deploy/docker/requirements.txt deploy/docker/build-requirements.txt ./
RUN pip install --no-cache-dir --require-hashes --only-binary :all: -r build-requirements.txt && \
    pip wheel --no-cache-dir --require-hashes --only-binary :all: --wheel-dir /wheels -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY vllm_router vllm_router
RUN pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12.14-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
# The one version of the package that the first stage made.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'vllm-router-trio[shared]'
# By number: Kubernetes' runAsNonRoot does not look names up.
RUN useradd --system --no-create-home --uid 10001 router
USER 10001:10001
ENV PYTHONUNBUFFERED=1
EXPOSE 8888
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["python", "-m", "vllm_router.cli.alive"]
# Drains: allow more time than drain_timeout (docker run --stop-timeout, stop_grace_period).
STOPSIGNAL SIGTERM
# Any command of vllm-router can follow the image's name.
ENTRYPOINT ["vllm-router"]
# Mount the directory, not the one file: a file that is replaced atomically is a new file, which a
# mounted file never shows, so it would not be reloaded.
CMD ["run", "--console", "--config", "/etc/vllm-router/servers.toml"]
