#!/bin/sh
# Run tests with another transformers than the one that is installed:
#     tests/with_transformers.sh VERSION [arguments of pytest]
# VERSION is a number, or "newest". It is installed into build/ beside .venv, which stays as it is, with what it
# depends on and with torchvision, which Qwen's processor needs (and which .venv goes without, because PyPI's is
# built for CUDA). PYTHON names the interpreter that has torch, peft and the project; .venv/bin/python is taken
# otherwise.
set -eu
cd "$(dirname "$0")/.."
version=${1:?usage: tests/with_transformers.sh VERSION [arguments of pytest]}
shift
python=${PYTHON:-.venv/bin/python}
folder=$PWD/build/transformers-$version

if [ ! -f "$folder/.complete" ]; then
    rm -rf "$folder"
    if [ "$version" = newest ]; then wanted=transformers; else wanted="transformers==$version"; fi
    "$python" -m pip install --quiet --disable-pip-version-check --target "$folder" "$wanted"
    # torch 2.N and torchvision 0.(N + 15) are released together.
    vision=$("$python" -c 'import torch; print("0.%d.0" % (int(torch.__version__.split(".")[1]) + 15))')
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" \
        "torchvision==$vision" || echo "torchvision $vision is not to be had: tests that need it are skipped"
    touch "$folder/.complete"
fi

PYTHONPATH=$folder:$PWD/python:$PWD
export PYTHONPATH
"$python" - "$version" <<'EOF'
import sys
import huggingface_hub, peft, torch, transformers
print("transformers", transformers.__version__, "peft", peft.__version__, "torch", torch.__version__,
      "huggingface_hub", huggingface_hub.__version__, flush=True)
if sys.argv[1] not in ("newest", transformers.__version__):
    sys.exit(f"another transformers is in front: {transformers.__file__}")
EOF
exec "$python" -m pytest -q "$@"
