# For a CPU; serves a small trained model that ships with the package. From the root of the repository:
#   docker build --file docker/cpu.Dockerfile --tag sglang-amd:cpu .
FROM python:3.12-slim-bookworm

WORKDIR /opt/sglang-amd
COPY pyproject.toml README.md LICENSE ./
COPY python ./python

# PyPI's torch for x86-64 is several gigabytes of CUDA. Triton compiles the kernels of GPUs alone.
RUN python3 -m pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu 'torch>=2.9,<2.14' \
 && python3 -m pip install --no-cache-dir . \
 && useradd --create-home sglang

USER sglang
ENV HF_HOME=/models/huggingface
EXPOSE 30000
HEALTHCHECK --interval=30s --timeout=25s --start-period=5m \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/health', timeout=20)"]
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0"]
