#!/bin/sh
# Installs a wheel into a clean environment, without a compiler and away from the repository, and uses it:
#     tests/with_wheel.sh dist/dualedit_kernels-*.whl
# TORCH: what pip is to install as torch. PYTHON: the Python of the environment.
set -e
wheel="$(realpath "$1")"
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/env"
export CXX=/nowhere CC=/nowhere  # whoever calls a compiler fails
"$place/env/bin/python" -m pip install -q ${TORCH:-torch}
"$place/env/bin/python" -m pip install -q "$wheel"
cd "$place"
PATH="$place/env/bin:/usr/bin:/bin"
dualedit doctor
dualedit kernels | grep -q "cpp" || { echo "the compiled operators do not run"; exit 1; }
dualedit sample pictures
dualedit edit pictures/logo.png "who founded this brand?" maria
dualedit ask pictures/logo-again.png "who founded this brand?" | grep -q maria || { echo "the edit is not answered"; exit 1; }
echo "$(basename "$wheel") works"
