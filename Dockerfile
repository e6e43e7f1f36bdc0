# Training and serving in one image, for PAI, Kubernetes and SkyPilot (deploy/) alike.
#   docker build -t qwenvl-ft .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" qwenvl-ft qwenvl-ft train --config lora.yaml
#   docker run --rm --gpus all -p 8000:8000 -e API_KEY -v "$PWD/runs/first-merged:/model" qwenvl-ft
# The machine needs NVIDIA's driver and container toolkit. CUDA 13.2 is what the locked torch brings and was built for.
FROM nvidia/cuda:13.2.1-base-ubuntu24.04
# No version of python3: Ubuntu's archive keeps none but the newest.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv==0.13.9

ENV PATH=/opt/uv/bin:$PATH
# Compiled here: who runs it may not write there, and each start would compile what it imports anew.
ENV UV_PYTHON_DOWNLOADS=never UV_NO_CACHE=1 UV_PROJECT_ENVIRONMENT=/opt/venv UV_COMPILE_BYTECODE=1
WORKDIR /opt/qwenvl_ft
# First what is locked: gigabytes, which a change of the code leaves as they are.
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-dev --no-install-project
COPY README.md LICENSE train.py ./
COPY configs ./configs
COPY data ./data
COPY qwenvl_ft ./qwenvl_ft
RUN uv sync --frozen --no-dev --no-editable && install --directory --owner=1000 --group=1000 /work

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
# Ubuntu's own user, by number: Kubernetes tells by it that it is not root.
USER 1000:1000
EXPOSE 8000
# Of the server; to a container that trains give --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m CMD ["python", "-c", "import os; from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('LISTENING_PORT', 8000)}/health\", timeout=5)"]
CMD ["qwenvl-ft", "serve", "/model", "--host", "0.0.0.0", "--api-key-env", "API_KEY"]
