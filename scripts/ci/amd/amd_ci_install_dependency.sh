#!/usr/bin/env bash
# Install this checkout into the running container, on top of the image's own torch, Triton, aiter and mori.
set -euo pipefail

name="${AMD_CI_CONTAINER:-ci_sglang}"
in_container() {
    docker exec "$name" bash -euo pipefail -c "$1"
}

# The image's sglang goes: two distributions may not own one package.
in_container 'python3 -m pip uninstall --yes --quiet sglang || true'
# Whatever the test extra asks for, the ROCm builds stay as the image has them.
in_container 'python3 -m pip list --format=freeze | grep -iE "^(torch|triton|pytorch-triton|pytorch-triton-rocm)==" >/tmp/keep.txt'
in_container 'cat /tmp/keep.txt && python3 -m pip install --quiet --constraint /tmp/keep.txt --editable "/sglang-checkout[amd]"'
# Of the test extra only what tests import: it names Triton too, which ROCm images carry under other names.
transformers="$(sed -n 's/^ *"\(transformers.*\)",$/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../../../pyproject.toml")"
in_container "python3 -m pip install --quiet --constraint /tmp/keep.txt '$transformers' openai"
in_container 'python3 - <<END
import torch
assert torch.version.hip, f"torch {torch.__version__} is no ROCm build any more"
print("torch", torch.__version__, "HIP", torch.version.hip, torch.cuda.device_count(), "GPUs")
END'
in_container 'cd /sglang-checkout && python3 -m sglang.check_env && python3 -m sglang.kernels'
