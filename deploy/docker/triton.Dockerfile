# Triton Inference Server for packages of redpp-serve. Build: docker build -f deploy/docker/triton.Dockerfile deploy/docker
# The build arguments TORCH, TORCH_INDEX and ENGINES, and the target sbom, are those of torchserve.Dockerfile.
# 26.10 is later than all fixes that NVIDIA's security bulletins ask for: 25.07 (CVE-2025-23310, -23311, -23319, -23320,
# -23334), 26.03 (CVE-2026-24206 to -24215) and 26.07, the newest bulletin known when this line was written.
ARG BASE=nvcr.io/nvidia/tritonserver:26.10-py3
FROM ${BASE} AS server
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG ENGINES="onnxruntime openvino"

RUN apt-get update \
    && apt-get install -y --no-install-recommends nginx-light \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/*.txt /opt/redpp/requirements/
# The image's Python belongs to its distribution; nothing else in the container uses it.
RUN set -eu; cd /opt/redpp/requirements; \
    lists="-r triton.txt"; for engine in $ENGINES; do lists="$lists -r triton-$engine.txt"; done; \
    pip install --no-cache-dir --break-system-packages --ignore-installed --require-hashes $lists; \
    index=; if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then index="--index-url $TORCH_INDEX"; fi; \
    pip install --no-cache-dir --break-system-packages $index -r "triton-$TORCH.txt"; \
    install -d -o 1000 -g 1000 /cache
COPY probe.py sbom.py front.sh start-triton.sh /opt/redpp/
RUN python3 /opt/redpp/sbom.py redpp-serve/triton > /opt/redpp/sbom.cdx.json

# /cache keeps compiled kernels and measured plans across restarts. DRAIN_S: see front.sh.
ENV SERVER=triton MODELS=/models VARIANT=both DRAIN_S=5 \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    REDPP_PLAN_CACHE=/cache/plans.json GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    TMPDIR=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
VOLUME ["/cache"]
EXPOSE 8000 8002
HEALTHCHECK --interval=15s --timeout=6s --start-period=180s --retries=3 CMD ["python3", "/opt/redpp/probe.py"]
ENTRYPOINT ["sh", "/opt/redpp/start-triton.sh"]

FROM scratch AS sbom
COPY --from=server /opt/redpp/sbom.cdx.json /

FROM server
