#!/bin/sh
# Build an image, run it with compose.yaml's hardening, ask it for predictions, and stop it under load:
#   sh deploy/docker/try.sh torchserve|triton PACKAGE          (the folder dist/NAME; needs root)
# It prints the seconds until the container was healthy, its memory, the image's size and the requests lost, and leaves
# nothing behind. Exit code 77: it cannot be tried here, and why. Where no image registry can be reached, the base image
# is made by debootstrap; for Triton the server is the one that redpp-serve uses on this machine.
# Environment: LIMIT_S (900), TRY_DIR (a folder with room for gigabytes), WHEELS (a folder with wheels, such as torch's),
# ROOTFS (what debootstrap has made before).
set -eu
server="${1:?torchserve or triton}" package=$(readlink -f "${2:?a packaged folder}")
here=$(dirname "$(readlink -f "$0")")
if [ -z "${TRY_INNER:-}" ]; then TRY_INNER=1 exec timeout -k 300 "${LIMIT_S:-900}" sh "$0" "$@"; fi
name=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["name"])' "$package/report.json")
not_here() { echo "not tried: $*" >&2; exit 77; }
[ "$(id -u)" = 0 ] || not_here "dockerd needs root"
for tool in dockerd docker; do command -v $tool > /dev/null || not_here "no $tool here (Debian: apt-get install docker.io runc)"; done

work=$(mktemp -d "${TRY_DIR:-/tmp}/redpp-try.XXXXXX")
daemon='' wheels='' clients=''
clean() {
  trap - EXIT TERM INT
  [ -z "$daemon" ] || docker ps -aq 2>/dev/null | xargs -r docker rm -f > /dev/null 2>&1 || true
  for process in $clients $wheels $daemon; do kill "$process" 2>/dev/null || true; done
  [ -z "$daemon" ] || wait "$daemon" 2>/dev/null || true
  grep -o "$work[^ ]*" /proc/mounts | sort -r | xargs -r umount -l 2>/dev/null || true
  rm -rf "$work"
}
trap clean EXIT
trap 'exit 143' TERM INT
step() { echo "== $* ($(($(date +%s) - begun)) s)" >&2; }
begun=$(date +%s)

# A daemon of its own: no network of its own, and the storage that this file system allows.
export DOCKER_HOST="unix://$work/docker.sock" DOCKER_BUILDKIT=0
for storage in overlay2 vfs; do
  dockerd --iptables=false --ip6tables=false --bridge=none --storage-driver=$storage --data-root="$work/data" \
      --exec-root="$work/exec" --pidfile="$work/pid" -H "$DOCKER_HOST" > "$work/dockerd.log" 2>&1 &
  daemon=$!
  tries=40
  until docker info > /dev/null 2>&1 || ! kill -0 $daemon 2>/dev/null || [ $((tries -= 1)) = 0 ]; do sleep 0.5; done
  if docker info > /dev/null 2>&1; then break; fi
  kill $daemon 2>/dev/null || true
  daemon=
done
[ -n "$daemon" ] || not_here "dockerd cannot start: $(tail -n 1 "$work/dockerd.log")"
step "dockerd runs with $storage"

base=$(sed -n 's/^ARG BASE=//p' "$here/$server.Dockerfile")
arguments="--build-arg BASE=$base"
if ! timeout 60 docker pull -q "$base" > "$work/pull.log" 2>&1; then
  echo "$base cannot be fetched: $(tail -n 1 "$work/pull.log" | cut -c1-120)" >&2
  command -v debootstrap > /dev/null || not_here "no debootstrap here (Debian: apt-get install debootstrap)"
  if [ -n "${ROOTFS:-}" ]; then tree="$ROOTFS"; else
    tree="$work/rootfs"
    debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates bookworm "$tree" > "$work/debootstrap.log" \
      || not_here "debootstrap failed: $(tail -n 1 "$work/debootstrap.log")"
  fi
  tar -C "$tree" --exclude='./proc/*' --exclude='./sys/*' -c . | docker import - redpp-try/debian:1 > /dev/null
  mkdir -p "$work/base/tritonserver"
  cp /etc/ssl/certs/ca-certificates.crt "$work/base/"
  printf '[global]\nbreak-system-packages = true\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$work/base/pip.conf"
  if [ -n "${WHEELS:-}" ]; then
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    python3 -m http.server --bind 127.0.0.1 --directory "$WHEELS" "$port" > /dev/null 2>&1 &
    wheels=$!
    echo "find-links = http://127.0.0.1:$port/" >> "$work/base/pip.conf"
  fi
  cat > "$work/base/Dockerfile" <<'BASE'
FROM redpp-try/debian:1
RUN apt-get update && apt-get install -y --no-install-recommends libpython3.11 && rm -rf /var/lib/apt/lists/*
COPY ca-certificates.crt /etc/ssl/certs/
COPY pip.conf /etc/
COPY tritonserver /opt/tritonserver
ENV PATH=/opt/tritonserver/bin:$PATH LD_LIBRARY_PATH=/opt/tritonserver/lib PYTHONPATH=/usr/local/lib/python3.11/dist-packages
BASE
  if [ "$server" = triton ]; then
    python3 "$here/local_triton.py" "$work/base/tritonserver" || not_here "no Triton Inference Server on this machine"
  fi
  docker build -q --network=host -t redpp-try/base:1 "$work/base" > /dev/null
  arguments="--build-arg BASE=redpp-try/base:1 --build-arg TORCH_INDEX="
  step "a base image made by debootstrap"
fi

# shellcheck disable=SC2086  # one word for each argument
docker build --network=host $arguments -t redpp-try/server:1 -f "$here/$server.Dockerfile" "$here" > "$work/build.log" 2>&1 \
  || { tail -n 30 "$work/build.log" >&2; echo "the image cannot be built" >&2; exit 1; }
step "the image"
docker run --rm --network=none --entrypoint cat redpp-try/server:1 /opt/redpp/sbom.cdx.json > "$work/sbom.json"
parts=$(python3 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["components"]))' "$work/sbom.json")

run() { docker run -d --init --read-only --cap-drop ALL --security-opt no-new-privileges --network=host --pids-limit 1024 \
  --memory 6g --cpus 2 --shm-size 1g --tmpfs /tmp:exec,mode=1777,size=1g -v "$package:/models:ro" -e MODEL_NAME="$name" "$@"; }
container=$(run redpp-try/server:1)
started=$(date +%s)
until [ "$(docker inspect -f '{{.State.Health.Status}}' "$container")" = healthy ]; do
  [ "$(docker inspect -f '{{.State.Running}}' "$container")" = true ] \
    || { docker logs "$container" 2>&1 | tail -n 100 | cut -c1-300 >&2; echo "the container ended" >&2; exit 1; }
  docker exec "$container" python3 /opt/redpp/probe.py > /dev/null 2>&1 && break
  sleep 1
done
ready=$(($(date +%s) - started))
step "both versions answer"

docker exec "$container" id -u | grep -qx 1000
! docker exec "$container" touch /opt/redpp/x 2>/dev/null || { echo "the root file system can be written" >&2; exit 1; }
memory=$(docker stats --no-stream --format '{{.MemUsage}}' "$container" | cut -d/ -f1)
size=$(docker image inspect -f '{{.Size}}' redpp-try/server:1)
sample=$(ls "$package"/sample.np?)
if [ "$server" = torchserve ]; then
  token=$(docker exec "$container" python3 -c 'import json; print(json.load(open("/tmp/redpp/key_file.json"))["inference"]["key"])')
  set -- "http://127.0.0.1:8080/predictions/$name" "$sample" --header "Authorization: Bearer $token"
else
  set -- "http://127.0.0.1:8000/v2/models/$name/infer" "$sample"
fi
python3 "$here/clients.py" "$@" > "$work/counts.json" 2> "$work/clients.log" & clients=$!
sleep 5
stopping=$(date +%s%N)
docker stop -t 40 "$container" > /dev/null
seconds=$(python3 -c "print(f'{($(date +%s%N) - $stopping) / 1e9:.1f}')")
wait $clients && code=0 || code=$?
clients=
ended=$(docker inspect -f '{{.State.ExitCode}}' "$container")
echo "$server: ready in $ready s, $memory of memory, image of $((size / 1000000)) MB with $parts parts in its SBOM;" \
  "stopped in $seconds s with exit code $ended, requests: $(cat "$work/counts.json")"
[ "$code" = 0 ] || { cat "$work/clients.log" >&2; exit 1; }
[ "$ended" = 0 ] || [ "$server" = triton ] || exit 1
