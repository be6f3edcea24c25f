#!/usr/bin/env bash
# Wait until the GPUs of this runner are free, as earlier jobs may still be ending: ensure_vram_clear.sh rocm
# Exit status 1, with what is in the way, when a GPU still holds more than 10 % of its memory after two minutes.
set -euo pipefail
[ "${1:-}" = rocm ] || { echo "usage: ensure_vram_clear.sh rocm" >&2 && exit 2; }

for _ in $(seq 24); do
    used="$(rocm-smi --showmemuse --csv | awk -F, '$1 ~ /^card/ && $2 > most { most = $2 } END { print most + 0 }')"
    [ "$used" -gt 10 ] || { echo "GPU memory in use: $used % at most" && exit 0; }
    sleep 5
done
echo "error: a GPU still has $used % of its memory in use" >&2
rocm-smi --showpids >&2 || true
exit 1
