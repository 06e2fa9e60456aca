#!/bin/bash
# Install the programs that tests start, from Debian's archive: a browser for the report, an OCI
# registry for publishing, an emulator and a compiler for counting instructions. Needs root. A test
# whose program is missing is skipped and says so.
set -euo pipefail
needed=(chromium docker-registry qemu-user gcc g++ g++-aarch64-linux-gnu)
dpkg --status "${needed[@]}" >/dev/null 2>&1 && exit 0
[ "$(id -u)" = 0 ] || { echo "tools.sh: wants root" >&2; exit 1; }
apt-get --quiet update
DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${needed[@]}"
