#!/usr/bin/env bash
# Run a command in the container with CI's environment: amd_ci_exec.sh [-w DIR] [-e KEY=VALUE]... COMMAND...
set -euo pipefail

name="${AMD_CI_CONTAINER:-ci_sglang}"
workdir=/sglang-checkout
environment=(-e SGLANG_IS_IN_CI=1 -e SGLANG_IS_IN_CI_AMD=1 -e SGLANG_USE_AITER=1)
while getopts "w:e:" option; do
    case "$option" in
    w) workdir="$OPTARG" ;;
    e) environment+=(-e "$OPTARG") ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || { echo "error: no command given" >&2 && exit 2; }
exec docker exec -w "$workdir" "${environment[@]}" "$name" "$@"
