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
exec tritonserver --model-repository="$repository" --model-control-mode=none --disable-auto-complete-config \
    --http-address=0.0.0.0 --http-port="${HTTP_PORT:-8000}" --allow-grpc=false \
    --http-restricted-api="model-repository,shared-memory,trace,logging:redpp-closed=$key" \
    --metrics-address=0.0.0.0 --metrics-port=8002 --exit-timeout-secs=30
