#!/usr/bin/env bash
# Several processes of one job on this machine:  scripts/launch.sh 2 sft @ configs/sft_tiny.toml --run-name two
# Each process takes an even share of the accelerators, or DEVICES virtual CPU devices (1 unless set).
# Ends with the first exit code that is not 0; Ctrl-C, SIGTERM and a terminal that closes reach all processes.
set -euo pipefail
count=${1:-}
if [[ ! $count =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
    echo "usage: scripts/launch.sh PROCESSES COMMAND [ARGUMENTS...], as in: scripts/launch.sh 2 sft @ configs/sft_tiny.toml" >&2
    exit 2
fi
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_NUM_CPU_DEVICES=${DEVICES:-1}
accelerators=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
share=$((accelerators / count))
processes=()
for ((process = 0; process < count; process++)); do
    if ((share)); then
        JAX_LOCAL_DEVICE_IDS=$(seq -s, $((process * share)) $((process * share + share - 1)))
        export JAX_LOCAL_DEVICE_IDS
    fi
    JAX_PROCESS_ID=$process uv run "$@" &
    processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' TERM HUP
trap : INT # the terminal sends it to the processes itself
code=0
for process in "${processes[@]}"; do
    while kill -0 "$process" 2>/dev/null; do # a signal ends `wait` before the process ends
        wait "$process" && status=0 || status=$?
    done
    wait "$process" 2>/dev/null && status=0 || status=$?
    ((code)) || code=$status
done
exit "$code"
