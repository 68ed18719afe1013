# TorchServe for packages of redpp-serve, on a CPU or a GPU. Build: docker build -f deploy/docker/torchserve.Dockerfile deploy/docker
# Mount the package (the folder dist/NAME) at /models. redpp-serve itself is not needed: each archive carries its code.
FROM python:3.11.15-slim-bookworm

COPY torchserve-requirements.txt /opt/redpp/requirements.txt
RUN pip install --no-cache-dir -r /opt/redpp/requirements.txt \
    && useradd --uid 1000 --no-create-home --shell /usr/sbin/nologin redpp \
    && install -d -o redpp -g redpp /cache /metrics
COPY probe.py start-torchserve.sh torchserve.properties /opt/redpp/

# Server and exporter share the volume /metrics. /cache keeps compiled kernels and measured plans across restarts.
ENV SERVER=torchserve MODELS=/models VARIANT=both \
    PROMETHEUS_MULTIPROC_DIR=/metrics TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    REDPP_PLAN_CACHE=/cache/plans.json \
    TMPDIR=/tmp TEMP=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
VOLUME ["/cache", "/metrics"]
EXPOSE 8080 9400
HEALTHCHECK --interval=15s --timeout=6s --start-period=180s --retries=3 CMD ["python3", "/opt/redpp/probe.py"]
ENTRYPOINT ["sh", "/opt/redpp/start-torchserve.sh"]
