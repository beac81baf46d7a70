#!/usr/bin/env bash
# How fast the job is on a GPU, and whether its images are right there: one part a call, under 8 minutes each on an H100.
#
#   bash benchmarks/gpu.sh pack      # where there is a network: put what the GPU machine may lack into .gpu/
#   bash benchmarks/gpu.sh speed     # on the GPU machine, in a copy of this folder: install that, measure
#   bash benchmarks/gpu.sh checks    # parity, neighbours, processes, kills, memory
#   bash benchmarks/gpu.sh profile   # where the time goes
#   bash benchmarks/gpu.sh large     # speed again, at the size of Stable Diffusion
#   bash benchmarks/gpu.sh variants  # what each change to a pass is worth
#   bash benchmarks/gpu.sh speed --smoke   # any part, anywhere: small and on the CPU, to see that it runs
#
# Rows are printed as they are measured, and kept in .gpu/results.md. .gpu/ keeps the checkpoints and the compiler's cache
# between calls. The GPU machine needs Python with torch, accelerate, transformers, numpy, pillow, safetensors and tqdm;
# what it has is used, and diffusers comes along. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [[ ${1:-} == pack ]]; then
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest .gpu -c constraints.txt \
    diffusers filelock importlib_metadata zipp
  ls .gpu
  exit
fi

if compgen -G ".gpu/*.whl" > /dev/null && ! "$python" -c "import diffusers" 2> /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .gpu/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.gpu/inductor}
"$python" -m benchmarks.gpu "$@"
