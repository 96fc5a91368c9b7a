#!/usr/bin/env bash
# Opens MLflow's page over the runs of this checkout, or says where the server of MLFLOW_TRACKING_URI is.
#   dashboards/mlflow.sh [mlflow server options]
set -euo pipefail
cd "$(dirname "$0")/.."
store="${MLFLOW_TRACKING_URI:-sqlite:///$PWD/runs/mlflow.db}"
if [[ "$store" == http* ]]; then
    echo "The runs are on $store"
    exit
fi
mkdir -p runs
exec mlflow server --backend-store-uri "$store" --host 127.0.0.1 --port "${MLFLOW_PORT:-5000}" "$@"
