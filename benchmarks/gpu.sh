#!/usr/bin/env bash
# Whether the job is right on a GPU, and how fast, in 8 minutes: one table, the last thing printed.
#
#   bash benchmarks/gpu.sh pack      # where there is a network: put what the GPU machine may lack into .gpu/
#   bash benchmarks/gpu.sh           # on the GPU machine, in a copy of this folder: install that, measure
#   bash benchmarks/gpu.sh --smoke   # anywhere: every part, small and on the CPU, to see that it runs
#
# The GPU machine needs Python with torch, accelerate, transformers, numpy, pillow, safetensors, filelock and tqdm; what it
# has is used, and diffusers comes along. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [[ ${1:-} == pack ]]; then
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest .gpu -c constraints.txt \
    diffusers importlib_metadata zipp
  ls .gpu
  exit
fi

if compgen -G ".gpu/*.whl" > /dev/null && ! "$python" -c "import diffusers" 2> /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .gpu/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m benchmarks.gpu "$@"
