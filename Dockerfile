# The images API in a container, for GPUs whose driver takes CUDA 13; it is what a manifest of --export kuberay runs too.
#
#   docker build -t sana-deploy .
#   docker run --gpus all --init --stop-timeout 130 -p 127.0.0.1:8000:8000 \
#     -v "$PWD/plan.json:/plan.json:ro" -v sana-cache:/cache sana-deploy plan_file=/plan.json
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS built
ARG EXTRAS=serve-ray,int8,nf4
# Ubuntu keeps only the newest build of a version, so that a pin would fail with the next one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY conf ./conf
COPY sana_deploy ./sana_deploy
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM ${BASE}
# gcc and Python's headers are for Triton (runtime=compiled), wget for the health check and for KubeRay's probes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home sana \
    && install --directory --owner sana --group sana /cache
COPY --from=built /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SANA_DEPLOY_CACHE=/cache/sana_deploy \
    HF_HOME=/cache/huggingface \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /home/sana
VOLUME /cache
EXPOSE 8000
# The process answers while it loads, so that only one that hangs or has ended is unhealthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["wget", "-q", "-T", "4", "-O", "/dev/null", "http://127.0.0.1:8000/health"]
# SIGTERM finishes what was accepted; the exec form hands it to the service itself.
STOPSIGNAL SIGTERM
ENTRYPOINT ["sana-deploy", "serve", "serve.host=0.0.0.0"]
CMD ["--help"]
