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

# pip_install ARGUMENT...: with pip's own progress on a terminal; in a log, the phases that `say` names are enough.
pip_install() {
    local quiet=()
    [ -t 1 ] || quiet=(--quiet --progress-bar off)
    "$VENV/bin/python" -m pip install --no-compile "${quiet[@]}" "$@"
}

say() {
    echo "[$((SECONDS - BEGAN)) s] $*"
}

# True if the host of a URL answers, in whatever way: pip would try for a minute before it says that none does.
answers() {
    "$VENV/bin/python" - "$1" <<'EOF'
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=10)
except urllib.error.HTTPError as error:
    sys.exit(error.code in (502, 503, 504))
except OSError as error:
    sys.exit("certificate" not in str(error).lower())
EOF
}

# Where no GPU is seen, torch's CPU build: PyPI's own is several GB of CUDA on x86-64. What torch needs is left to
# the install of the package, so that one index alone decides which build it is.
install_torch() {
    local gpu
    gpu="$(gpu_kind)"
    if torch_fits "$VENV/bin/python"; then
        return
    elif [ -n "${SGLANG_TORCH_INDEX_URL:-}" ]; then
        say "installing torch from SGLANG_TORCH_INDEX_URL"
        pip_install --no-deps --index-url "$SGLANG_TORCH_INDEX_URL" "$TORCH_RANGE"
    elif [ "$gpu" = amd ]; then
        die "an AMD GPU, but no ROCm build of torch in reach: run inside an image that has one, or set" \
            "SGLANG_TORCH_INDEX_URL to the index of your ROCm version (https://download.pytorch.org/whl/rocmX.Y)"
    elif [ "$gpu" = nvidia ] || [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
        say "installing torch from the package index that pip is set up with"
        pip_install "$TORCH_RANGE"
    elif pip_install --quiet --dry-run --no-index --no-deps "$TORCH_RANGE" >/dev/null 2>&1; then
        say "installing torch from the local wheels that pip is set up with"
        pip_install --no-index --no-deps "$TORCH_RANGE"
    else
        say "installing torch's CPU build from $TORCH_CPU_INDEX"
        { answers "$TORCH_CPU_INDEX/torch/" && pip_install --no-deps --index-url "$TORCH_CPU_INDEX" "$TORCH_RANGE"; } ||
            die "torch's CPU build cannot be downloaded from $TORCH_CPU_INDEX; set SGLANG_TORCH_INDEX_URL to an index that" \
                "has it, or to https://pypi.org/simple for the CUDA build, which runs on CPUs too and is much larger"
    fi
}

# ensure_venv EXTRAS: idempotent; a stamp of pyproject.toml and the interpreter says that nothing is left to do.
# EXTRAS is empty, "test" or "test,clients": what was installed with more covers less.
ensure_venv() {
    local extra="${1:-}" python stamp file
    BEGAN=$SECONDS
    if [ -x "$VENV/bin/python" ]; then
        stamp="$({ cat "$REPO/pyproject.toml"; echo "$REPO"; "$VENV/bin/python" -V; } | cksum)"
        for file in "$VENV/.stamp-base" "$VENV/.stamp-test" "$VENV/.stamp-test,clients"; do
            [[ $extra = "" || ${file##*/} = *"-$extra"* ]] || continue
            [ "$(cat "$file" 2>/dev/null)" != "$stamp" ] || return 0
        done
    fi
    echo "installing into $VENV, once; SGLANG_TORCH_INDEX_URL can name the package index that torch comes from"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)"
        say "making the environment with $python"
        # In ROCm images torch belongs to the system's Python: see it instead of replacing it.
        if [ "$(gpu_kind)" = amd ] && [ -z "${SGLANG_TORCH_INDEX_URL:-}" ] && torch_fits "$python"; then
            "$python" -m venv --clear --system-site-packages "$VENV"
        else
            "$python" -m venv --clear "$VENV"
        fi
    fi
    install_torch
    say "installing sglang-amd${extra:+[$extra]} and what it needs"
    pip_install -e "$REPO${extra:+[$extra]}"
    stamp="$({ cat "$REPO/pyproject.toml"; echo "$REPO"; "$VENV/bin/python" -V; } | cksum)"
    echo "$stamp" >"$VENV/.stamp-${extra:-base}"
    say "installed, $(du -sm "$VENV" | cut -f1) MiB"
}
