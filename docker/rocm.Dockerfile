# For MI300X, MI325X (gfx942), MI350X and MI355X (gfx950); not yet run on AMD hardware. From the root of the repository:
#   docker build --file docker/rocm.Dockerfile --tag sglang-amd:rocm .
# An image that also has AITER and MORI, and upstream's sglang, which is removed:
#   --build-arg BASE_IMAGE=lmsysorg/sglang:v0.5.12-rocm720-mi30x
ARG BASE_IMAGE=rocm/pytorch:rocm7.2.4_ubuntu24.04_py3.12_pytorch_release_2.10.0
FROM ${BASE_IMAGE}

WORKDIR /opt/sglang-amd
COPY pyproject.toml README.md LICENSE ./
COPY python ./python

# torch and Triton are the image's: their versions are constraints, so that pip can replace neither.
RUN python3 -m pip uninstall --yes sglang \
 && python3 -m pip list --format=freeze | grep -Ei '^(torch|triton|pytorch-triton-rocm)==' > /tmp/image.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/image.txt '.[amd]' \
 && python3 -c 'import torch, triton; assert torch.version.hip, "torch is no ROCm build any more"' \
 && rm /tmp/image.txt

ENV HF_HOME=/models/huggingface \
    HIP_FORCE_DEV_KERNARG=1 \
    HSA_NO_SCRATCH_RECLAIM=1 \
    NCCL_MIN_NCHANNELS=112
EXPOSE 30000
HEALTHCHECK --interval=30s --timeout=25s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/health', timeout=20)"]
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0"]
