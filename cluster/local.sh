#!/usr/bin/env bash
# Starts or stops a Ray cluster on this machine, with token authentication, for `ray job submit`.
#   cluster/local.sh start [ray start options]      cluster/local.sh stop
# It listens on the loopback address; NODE_ADDRESS=<this machine's address> lets other nodes join.
set -euo pipefail
cd "$(dirname "$0")/.."

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
# Relative paths in a job's settings are taken from here, not from the job's scratch directory.
export VALLEY_HOME="${VALLEY_HOME:-$PWD}"

case "${1:-}" in
start)
    shift
    ray get-auth-token --generate >/dev/null
    ray start --head --node-ip-address="${NODE_ADDRESS:-127.0.0.1}" --dashboard-host=127.0.0.1 --dashboard-port="${DASHBOARD_PORT:-8265}" "$@"
    cat <<EOF

The cluster is up. In each shell that talks to it:
    export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:${DASHBOARD_PORT:-8265}
then, for example:
    ray job submit --working-dir . -- python jobs/pretrain.py --config tiny output=runs/cluster
Stop it with: make cluster-stop
EOF
    ;;
stop)
    ray stop
    ;;
*)
    echo "usage: cluster/local.sh start|stop" >&2
    exit 2
    ;;
esac
