# evalmode in a container: `docker build -t evalmode .` trains, exports and certifies the default model, then serves it.
# Targets: cpu (the default) and gpu. A bundle of one's own instead of the training:
#   docker build --build-context bundle=bundles/NAME -t evalmode .
# pip listens to its own environment variables as build arguments, so that it can be pointed at a mirror, or at PyTorch's
# CPU builds for the training stage: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY . .

FROM python AS trained
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
RUN pip install -c constraints.txt '.[cpu,train,export]'
RUN evalmode train --data languages --arithmetic exact --weight-bits 7 --out /runs/languages \
    && evalmode export --kernels integer /runs/languages --out /bundles

# A stage of files alone, so that `--build-context bundle=DIR` can take its place.
FROM scratch AS bundle
COPY --from=trained /bundles /

# The service's environment: no torch, no onnx, and of evalmode only the rooms that serving reads. OpenTelemetry is 11 of
# its 281 MB, and does nothing until an endpoint is set.
FROM python AS environment-cpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
RUN pip install -c constraints.txt '.[cpu,tracing]' && python -m compileall -q /opt/venv/lib \
    && rm -rf /opt/venv/lib/python3*/site-packages/evalmode/model /opt/venv/lib/python3*/site-packages/evalmode/export

FROM python AS environment-gpu
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
RUN pip install -c constraints.txt '.[gpu,tracing]' && python -m compileall -q /opt/venv/lib \
    && rm -rf /opt/venv/lib/python3*/site-packages/evalmode/model /opt/venv/lib/python3*/site-packages/evalmode/export

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    EVALMODE_HOST=0.0.0.0 \
    EVALMODE_PORT=8000 \
    EVALMODE_BUNDLE=/bundles \
    EVALMODE_MODEL_CONTROL=false
COPY --from=bundle / /bundles
# A number, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 65532:65532
WORKDIR /
EXPOSE 8000
# It finds the server whatever flags it was given. The first success ends the start period, which a large model may need.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["evalmode", "healthcheck"]
ENTRYPOINT ["evalmode", "serve"]

FROM runtime AS gpu
COPY --from=environment-gpu /opt/venv /opt/venv
ENV EVALMODE_PROVIDER=cuda

FROM runtime AS cpu
COPY --from=environment-cpu /opt/venv /opt/venv
