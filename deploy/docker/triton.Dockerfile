# Triton Inference Server for packages of redpp-serve. Build: docker build -f deploy/docker/triton.Dockerfile deploy/docker
# 26.10 is later than all fixes that NVIDIA's security bulletins ask for: 25.07 (CVE-2025-23310, -23311, -23319, -23320,
# -23334), 26.03 (CVE-2026-24206 to -24215) and 26.07, the newest bulletin known when this line was written.
FROM nvcr.io/nvidia/tritonserver:26.10-py3

COPY triton-requirements.txt /opt/redpp/requirements.txt
# The image's Python belongs to its distribution; nothing else in the container uses it.
RUN pip install --no-cache-dir --break-system-packages -r /opt/redpp/requirements.txt \
    && install -d -o 1000 -g 1000 /cache
COPY probe.py start-triton.sh /opt/redpp/

# /cache keeps compiled kernels and measured plans across restarts.
ENV SERVER=triton MODELS=/models VARIANT=both \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    REDPP_PLAN_CACHE=/cache/plans.json \
    TMPDIR=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
VOLUME ["/cache"]
EXPOSE 8000 8002
HEALTHCHECK --interval=15s --timeout=6s --start-period=180s --retries=3 CMD ["python3", "/opt/redpp/probe.py"]
ENTRYPOINT ["sh", "/opt/redpp/start-triton.sh"]
