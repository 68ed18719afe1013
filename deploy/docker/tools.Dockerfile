# The command line in a container, for `package` in a cluster and for `ab watch`. Build in the project's root:
#   docker build -f deploy/docker/tools.Dockerfile -t redpp-serve/tools:0.2.0 .
ARG BASE=python:3.11.15-slim-bookworm
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

COPY deploy/docker/requirements/tools.txt deploy/docker/requirements/tools-cpu.txt /opt/redpp/requirements/
RUN set -eu; cd /opt/redpp/requirements; \
    pip install --no-cache-dir --require-hashes -r tools.txt; \
    index=; if [ -n "$TORCH_INDEX" ]; then index="--index-url $TORCH_INDEX"; fi; \
    pip install --no-cache-dir $index -r tools-cpu.txt
COPY pyproject.toml README.md LICENSE /opt/redpp/source/
COPY redpp_serve /opt/redpp/source/redpp_serve
COPY handlers /opt/redpp/source/handlers
COPY kernels /opt/redpp/source/kernels
COPY benchmarks/reference /opt/redpp/source/benchmarks/reference
COPY deploy/docker/sbom.py /opt/redpp/
RUN pip install --no-cache-dir --no-deps --no-build-isolation /opt/redpp/source \
    && rm -rf /opt/redpp/source \
    && python3 /opt/redpp/sbom.py redpp-serve/tools > /opt/redpp/sbom.cdx.json

ENV HOME=/tmp TMPDIR=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /tmp
ENTRYPOINT ["redpp-serve"]
