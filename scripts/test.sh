#!/usr/bin/env bash
# Install the test extra into .venv and run the CPU suites: scripts/test.sh [--install-only] [arguments of run_suite.py]
# One suite alone: scripts/test.sh --suite stage-a-test-cpu
# What runs at night, with the libraries of clients: scripts/test.sh --suite nightly-cpu --nightly
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case " $* " in
*" --nightly "*) ensure_venv test,clients ;;
*) ensure_venv test ;;
esac
[ "${1:-}" != --install-only ] || exit 0
case " $* " in
*" --suite"*) suites=() ;;
*) suites=(--suite stage-a-test-cpu --suite stage-b-test-cpu) ;;
esac
# Imports are most of the start of a file: its process is forked with them done.
imports=torch,transformers.models.deepseek_v3.modeling_deepseek_v3,transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
exec "$VENV/bin/python" "$REPO/test/run_suite.py" --hw cpu --continue-on-error --preload "$imports" "${suites[@]}" "$@"
