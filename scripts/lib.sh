# Shared by serve.sh and test.sh: find a Python, make .venv, install the package into it. Sourced, not run.
# Variables: PYTHON (interpreter to use), SGLANG_TORCH_INDEX_URL (package index to take torch from).

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"
TORCH_RANGE="$(sed -n 's/^ *"torch\(.*\)",$/torch\1/p' "$REPO/pyproject.toml")"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
    echo "error: $*" >&2
    exit 1
}

# A name on the PATH may be a shim without an interpreter behind it, or one without venv: each is tried.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a Python >= 3.10 with the venv module"
    done
    die "no Python >= 3.10 with the venv module found; install one (Debian: apt-get install python3-venv) or set PYTHON"
}

gpu_kind() {
    if [ -e /dev/kfd ]; then
        echo amd
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
        echo nvidia
    else
        echo none
    fi
}

torch_fits() {
    "$1" - "$TORCH_RANGE" <<'EOF' >/dev/null 2>&1
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
sys.exit(not Requirement(sys.argv[1]).specifier.contains(version("torch").split("+")[0]))
EOF
}

# Where no GPU is seen, torch's CPU build: PyPI's own is several GB of CUDA on x86-64. What torch needs is left to
# the install of the package, so that one index alone decides which build it is.
install_torch() {
    local pip="$VENV/bin/python -m pip install --quiet --no-compile" gpu
    gpu="$(gpu_kind)"
    if torch_fits "$VENV/bin/python"; then
        return
    elif [ -n "${SGLANG_TORCH_INDEX_URL:-}" ]; then
        $pip --no-deps --index-url "$SGLANG_TORCH_INDEX_URL" "$TORCH_RANGE"
    elif [ "$gpu" = amd ]; then
        die "an AMD GPU, but no ROCm build of torch in reach: run inside an image that has one, or set" \
            "SGLANG_TORCH_INDEX_URL to the index of your ROCm version (https://download.pytorch.org/whl/rocmX.Y)"
    elif [ "$gpu" = nvidia ] || [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        $pip "$TORCH_RANGE"
    elif $pip --no-index --no-deps "$TORCH_RANGE" >/dev/null 2>&1; then
        echo "torch: taken from the local wheels that pip is set up with"
    else
        $pip --no-deps --index-url "$TORCH_CPU_INDEX" "$TORCH_RANGE" ||
            die "torch's CPU build cannot be had from $TORCH_CPU_INDEX; set SGLANG_TORCH_INDEX_URL to an index that" \
                "has it, or to https://pypi.org/simple for the much larger CUDA build"
    fi
}

# ensure_venv EXTRA: idempotent; a stamp of pyproject.toml and the interpreter says that nothing is left to do.
ensure_venv() {
    local extra="${1:-}" python stamp began=$SECONDS
    if [ -x "$VENV/bin/python" ]; then
        stamp="$({ cat "$REPO/pyproject.toml"; echo "$REPO"; "$VENV/bin/python" -V; } | cksum)"
        if [ "$(cat "$VENV/.stamp-${extra:-base}" 2>/dev/null)" = "$stamp" ] ||
            [ "$(cat "$VENV/.stamp-test" 2>/dev/null)" = "$stamp" ]; then
            return
        fi
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        # In ROCm images torch belongs to the system's Python: see it instead of replacing it.
        if [ "$(gpu_kind)" = amd ] && [ -z "${SGLANG_TORCH_INDEX_URL:-}" ] && torch_fits "$python"; then
            "$python" -m venv --clear --system-site-packages "$VENV"
        else
            "$python" -m venv --clear "$VENV"
        fi
    fi
    echo "installing into $VENV ..."
    install_torch
    "$VENV/bin/python" -m pip install --quiet --no-compile -e "$REPO${extra:+[$extra]}"
    stamp="$({ cat "$REPO/pyproject.toml"; echo "$REPO"; "$VENV/bin/python" -V; } | cksum)"
    echo "$stamp" >"$VENV/.stamp-${extra:-base}"
    echo "installed in $((SECONDS - began)) s, $(du -sm "$VENV" | cut -f1) MiB"
}
