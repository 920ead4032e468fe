#!/usr/bin/env bash
# The numbers that are committed, on a machine that does nothing else: about an hour on 2 cores.
#   benchmarks/full.sh [resize|overhead|metering|gpu_smoke ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
if (( $# == 0 )); then set -- metering resize overhead gpu_smoke; fi
for script in "$@"; do
  options=(--save)
  if [[ $script == overhead ]]; then options+=(--full); fi
  echo "[$script] $(date +%H:%M:%S)"
  env -u RAY_ADDRESS "$python" "benchmarks/$script.py" "${options[@]}"
done
