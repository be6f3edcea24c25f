#!/usr/bin/env bash
# Install into .venv and start the server: scripts/serve.sh [any argument of launch_server]
# Without --model-path it serves the first of the models that ship inside the package.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
ensure_venv
exec "$VENV/bin/python" -m sglang.launch_server "$@"
