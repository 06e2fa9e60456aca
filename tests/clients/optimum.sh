#!/bin/bash
# Make an environment with optimum-onnx for tests/clients/test_optimum.py. It wants transformers
# before 4.58, so it has its own; torch is that of the Python that is given, by links.
#
#     tests/clients/optimum.sh build/optimum .venv/bin/python
#     python -m pytest tests/clients/test_optimum.py
set -euo pipefail
folder=$1 python=${2:-python3}
[ ! -e "$folder/installed" ] || exit 0
rm -rf "$folder"
"$python" -m venv "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
given=$("$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
for part in "$given"/{torch,torchgen,functorch,sympy,mpmath} "$given"/{torch,sympy,mpmath}-*.dist-info
do
  ln -s "$part" "$site/"
done
"$folder/bin/python" -m pip install --quiet 'optimum-onnx[onnxruntime]==0.1.0'
touch "$folder/installed"
