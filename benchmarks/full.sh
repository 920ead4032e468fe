#!/usr/bin/env bash
# The numbers that are committed, on a machine that does nothing else: about an hour on 2 cores.
#   benchmarks/full.sh [resize|overhead|metering|gpu_smoke ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
for name in "${@:-metering resize overhead gpu_smoke}"; do
  for script in $name; do
    options=(--save)
    if [[ $script == overhead ]]; then options+=(--full); fi
    echo "[$script] $(date +%H:%M:%S)"
    env -u RAY_ADDRESS "$python" "benchmarks/$script.py" "${options[@]}"
  done
done
