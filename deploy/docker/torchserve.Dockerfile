# TorchServe for packages of redpp-serve, on a CPU or a GPU. Build: docker build -f deploy/docker/torchserve.Dockerfile deploy/docker
# Mount the package (the folder dist/NAME) at /models. redpp-serve itself is not needed: each archive carries its code.
#   --build-arg TORCH=cuda                    torch for NVIDIA's GPUs, about 5 GB larger; cpu is the default
#   --build-arg TORCH_INDEX=URL               another index that has torch for CPUs alone
#   --build-arg ENGINES="openvino"            engines besides the own one; empty for none
#   --target sbom --output type=local,dest=.  the list of what is inside, sbom.cdx.json (also in the image, in /opt/redpp)
# renew.py renews requirements, hashes and digests.
ARG BASE=python:3.11.15-slim-bookworm
FROM ${BASE} AS server
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG ENGINES="onnxruntime openvino"

# Java and nginx are the distribution's, which mends them: build again to have its fixes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light openjdk-17-jre-headless \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/*.txt /opt/redpp/requirements/
RUN set -eu; cd /opt/redpp/requirements; \
    lists="-r torchserve.txt"; for engine in $ENGINES; do lists="$lists -r torchserve-$engine.txt"; done; \
    pip install --no-cache-dir --require-hashes $lists; \
    index=; if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then index="--index-url $TORCH_INDEX"; fi; \
    pip install --no-cache-dir $index -r "torchserve-$TORCH.txt"; \
    useradd --uid 1000 --no-create-home --shell /usr/sbin/nologin redpp; \
    install -d -o redpp -g redpp /cache /metrics
COPY probe.py sbom.py front.sh start-torchserve.sh torchserve.properties /opt/redpp/
RUN python3 /opt/redpp/sbom.py redpp-serve/torchserve > /opt/redpp/sbom.cdx.json

# Server and exporter share the volume /metrics. /cache keeps compiled kernels and measured plans across restarts.
# DRAIN_S: seconds from the signal to stop until the server ends, see front.sh.
ENV SERVER=torchserve MODELS=/models VARIANT=both DRAIN_S=5 \
    PROMETHEUS_MULTIPROC_DIR=/metrics TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    REDPP_PLAN_CACHE=/cache/plans.json GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    TMPDIR=/tmp TEMP=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
VOLUME ["/cache", "/metrics"]
EXPOSE 8080 9400
HEALTHCHECK --interval=15s --timeout=6s --start-period=180s --retries=3 CMD ["python3", "/opt/redpp/probe.py"]
ENTRYPOINT ["sh", "/opt/redpp/start-torchserve.sh"]

FROM scratch AS sbom
COPY --from=server /opt/redpp/sbom.cdx.json /

FROM server
