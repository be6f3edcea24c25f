#!/usr/bin/env bash
# Start the container in which AMD jobs run: amd_ci_start_container.sh [--image IMAGE] [--rocm-version rocm720]
# IMAGE (or AMD_CI_IMAGE) must hold a ROCm build of torch, aiter and mori; by default it is upstream's release image
# for the GPU of this runner. The checkout is mounted at /sglang-checkout.
set -euo pipefail

image="${AMD_CI_IMAGE:-}"
rocm="rocm720"
while [ $# -gt 0 ]; do
    case "$1" in
    --image) image="$2" && shift 2 ;;
    --rocm-version) rocm="$2" && shift 2 ;;
    *) echo "error: unknown argument $1" >&2 && exit 2 ;;
    esac
done

name="${AMD_CI_CONTAINER:-ci_sglang}"
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
if [ -z "$image" ]; then
    # Read to its end: a pipe that closes early would end this script without a word.
    arch="$(rocminfo | awk '!arch && match($0, /gfx[0-9a-f]+/) { arch = substr($0, RSTART, RLENGTH) } END { print arch }' || true)"
    case "$arch" in
    gfx942) family=mi30x ;;
    gfx950) family=mi35x ;;
    *) echo "error: no image is known for ${arch:-this GPU}; give --image" >&2 && exit 1 ;;
    esac
    image="lmsysorg/sglang:v0.5.12-$rocm-$family"
fi

echo "image: $image"
[ -e /dev/kfd ] || { echo "error: no /dev/kfd: this runner shows no AMD GPU" >&2 && exit 1; }
docker pull --quiet "$image"
docker rm --force "$name" >/dev/null 2>&1 || true
# RDMA devices are passed where the runner has them.
rdma=()
[ ! -d /dev/infiniband ] || rdma=(--device /dev/infiniband --cap-add IPC_LOCK --ulimit memlock=-1)
docker run --detach --name "$name" \
    --device /dev/kfd --device /dev/dri "${rdma[@]}" \
    --group-add video --ipc host --network host --shm-size 32g \
    --cap-add SYS_PTRACE --security-opt seccomp=unconfined \
    --volume "$checkout:/sglang-checkout" --workdir /sglang-checkout \
    "$image" sleep infinity
