# The job in a container:
#
#     docker build --tag userdiff .                                                      for NVIDIA GPUs
#     docker build --tag userdiff --build-arg TORCH_INDEX=... .                          for CPUs, or another CUDA
#     docker run --rm --gpus all --user "$(id -u)" --read-only --tmpfs /tmp --volume "$PWD:/data" userdiff \
#         --vae_path /data/vae --unet_path /data/unet --condition_encoder_path /data/encoder.pt --output_dir /data/dataset
#     docker run ... --entrypoint accelerate userdiff launch --config_file accelerate_configs/multi_gpu.yaml batch_generate.py ...

FROM python:3.12-slim

# Where torch's wheel comes from: one of the indexes that pytorch.org lists; without it, the usual one with its CUDA.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

WORKDIR /app
COPY pyproject.toml README.md LICENSE batch_generate.py ./
COPY accelerate_configs accelerate_configs
COPY userdiff userdiff
RUN pip install --no-cache-dir .

# Any user will do, with no home and nothing to write to but the output folder and /tmp.
USER 10001:10001
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/tmp
# Not through a shell: Python is process 1, and a stop of the container reaches it.
ENTRYPOINT ["python", "batch_generate.py"]
