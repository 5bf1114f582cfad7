#!/usr/bin/env bash
# galembed embed on all GPUs of one machine: a worker process for each.
#
#   ./embed.sh survey/ --store galaxies.lance [options of galembed embed]
#   GPUS="0 2" ./embed.sh ...             # only these
#   DASK_CUDA=1 ./embed.sh ...            # workers by dask-cuda, which also binds them to cores near their GPU
set -euo pipefail

GPUS=${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ')}
THREADS=${THREADS:-4}        # of each worker's engine, where it runs on the CPU after all
MEMORY=${MEMORY:-16GiB}      # of each worker
SCRATCH=${SCRATCH:-/tmp}
LOGS=${LOGS:-$PWD/logs}
DASK_CUDA=${DASK_CUDA:-}
ATTEMPTS=${ATTEMPTS:-3}
PAUSE=${PAUSE:-10}           # seconds between attempts

read -r -a gpus <<<"$GPUS"
mkdir -p "$LOGS"

# How many workers may be lost under a partition before it is suspected of killing them and halved.
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=${ALLOWED_FAILURES:-2}
# What Dask keeps for its developers, a profile of each second and all messages, grows for hours.
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH=20
# Dask has workers give memory back at once, and reading cutouts then takes twice as long.
export MALLOC_TRIM_THRESHOLD_=67108864 MALLOC_MMAP_THRESHOLD_=33554432

stopped=
trap 'stopped=1' INT TERM

alive() { kill -0 "$@" 2>/dev/null; }

pause() { # a signal ends it
    sleep "$1" &
    wait $! || true
}

address() {
    python -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$LOGS/scheduler.json" 2>/dev/null
}

embed() { # returns what galembed embed does
    local scheduler workers=() client at gpu status=1 waited=0
    rm -f "$LOGS/scheduler.json"
    dask scheduler --host 127.0.0.1 --port 0 --dashboard-address 127.0.0.1:0 --scheduler-file "$LOGS/scheduler.json" \
        >>"$LOGS/scheduler.log" 2>&1 &
    scheduler=$!
    until at=$(address); do
        if ! alive "$scheduler" || ((++waited > 120)); then
            echo "the scheduler did not start: see $LOGS/scheduler.log" >&2
            kill "$scheduler" 2>/dev/null || true
            return 1
        fi
        pause 1
    done
    local common=(--nthreads 2 --memory-limit "$MEMORY" --local-directory "$SCRATCH" --death-timeout 300)
    if [[ -n $DASK_CUDA ]]; then
        CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]}") dask cuda worker "$at" "${common[@]}" >>"$LOGS/workers.log" 2>&1 &
        workers+=($!)
    else
        for gpu in "${gpus[@]}"; do
            CUDA_VISIBLE_DEVICES=$gpu dask worker "$at" "${common[@]}" --name "gpu-$gpu" >>"$LOGS/worker-$gpu.log" 2>&1 &
            workers+=($!)
        done
    fi
    galembed embed "$@" --scheduler "$at" --threads "$THREADS" &
    client=$!
    while alive "$client" && alive "$scheduler" && [[ -z $stopped ]]; do
        alive "${workers[@]}" || break
        pause 2
    done
    kill -TERM "$client" 2>/dev/null || true # it commits what is finished; gone already where it ended by itself
    wait "$client" && status=0 || status=$?
    kill -TERM "${workers[@]}" "$scheduler" 2>/dev/null || true
    wait "${workers[@]}" "$scheduler" || true
    return "$status"
}

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    embed "$@" && exit 0 || status=$?
    echo "attempt $attempt ended with $status" >&2
    [[ -n $stopped || $status -eq 2 ]] && exit "$status"
    pause "$PAUSE"
done
exit 1
