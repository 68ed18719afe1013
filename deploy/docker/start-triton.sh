#!/bin/sh
# Serve a package with Triton Inference Server: VARIANT original, pruned, or both as versions 1 and 2 of one model.
set -eu
: "${MODEL_NAME:?the name of the packaged model is needed}"
case "${VARIANT:-both}" in
  both) other= ;;
  original) other=2 ;;
  pruned) other=1 ;;
  *) echo "VARIANT is '$VARIANT', expected original, pruned or both" >&2; exit 2 ;;
esac
packaged="$MODELS/triton/$MODEL_NAME"
if [ ! -f "$packaged/config.pbtxt" ]; then
  echo "$packaged/config.pbtxt is missing: MODELS must hold what redpp-serve package wrote for MODEL_NAME" >&2
  exit 2
fi
repository="$MODELS/triton"
if [ -n "$other" ]; then  # the server loads every version that it finds, so it gets a repository with only one
  repository="$TMPDIR/redpp/repository"
  rm -rf "$repository"
  mkdir -p "$repository/$MODEL_NAME"
  for entry in "$packaged"/*; do
    [ "${entry##*/}" = "$other" ] || cp -R "$entry" "$repository/$MODEL_NAME/"
  done
fi
# No model control: the gateway chooses the version. HTTP only: the gateway splits nothing else. All APIs but inference
# require a key that nobody knows.
key=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
. "$(dirname "$0")/front.sh"
address=0.0.0.0 port="${HTTP_PORT:-8000}"
if [ "${DRAIN_S:-0}" != 0 ]; then
  front_start "$address:$port" "${INNER_PORT:-8090}"
  address=127.0.0.1 port="${INNER_PORT:-8090}"
fi
stop() {
  [ "${DRAIN_S:-0}" = 0 ] || front_drain
  kill -TERM "$server" 2>/dev/null
}
trap stop TERM INT
tritonserver --model-repository="$repository" --model-control-mode=none --disable-auto-complete-config \
    --http-address="$address" --http-port="$port" --allow-grpc=false \
    --http-header-forward-pattern='(?i)(x-request-id|traceparent|tracestate)' \
    --http-restricted-api="model-repository,shared-memory,trace,logging:redpp-closed=$key" \
    --metrics-address=0.0.0.0 --metrics-port=8002 --exit-timeout-secs=30 &
server=$!
code=0
while kill -0 "$server" 2>/dev/null; do  # a signal ends a wait early
  wait "$server" && code=0 || code=$?
done
[ "${DRAIN_S:-0}" = 0 ] || kill -TERM "$front_pid" 2>/dev/null || true
exit "$code"
