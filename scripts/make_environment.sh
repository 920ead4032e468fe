#!/usr/bin/env bash
# Makes .venv with EADT and its tools in it, or leaves it as it is when nothing has changed.
# The environment is up to date when its stamp holds the sum of pyproject.toml and constraints.txt and
# this folder (an editable installation points into it).
# PYTHON: the interpreter to use (3.11 to 3.13); empty: the first that fits.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly stamp=.venv/.eadt-installed
readonly version_check='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"

say() { echo "[environment] $*"; }

is_usable() { "$1" -c "$version_check" >/dev/null 2>&1; }

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    is_usable "$PYTHON" && { echo "$PYTHON"; return; }
    say "PYTHON=$PYTHON is no Python 3.11 to 3.13." >&2
    return 1
  fi
  local candidate
  for candidate in python3 python3.11 python3.12 python3.13 python /usr/bin/python3; do
    is_usable "$candidate" && { echo "$candidate"; return; }
  done
  say "There is no Python 3.11, 3.12 or 3.13 here. Install one, or name it: make PYTHON=/path/to/python3.11" >&2
  return 1
}

if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && is_usable .venv/bin/python; then
  exit 0
fi

if ! is_usable .venv/bin/python; then
  python="$(find_python)"
  say "making .venv with $("$python" --version) ($(command -v "$python"))"
  rm -rf .venv
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    say "Could not make .venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi

say "installing EADT, torch, Ray, DeepSpeed and the tools: several GB, usually 3 to 10 minutes, silent meanwhile"
SECONDS=0
( while sleep 30 >/dev/null 2>&1; do say "still installing, for $SECONDS s"; done ) &
heartbeat=$!
trap 'kill "$heartbeat" 2>/dev/null || true' EXIT
# DeepSpeed's own operators need a compiler and are not used.
if ! DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable '.[dev]'; then
  say "The installation failed; pip's message is above. The usual causes: no network, a full disk." >&2
  exit 1
fi
echo "$wanted" > "$stamp"
say "ready after $SECONDS s; the program is .venv/bin/eadt"
