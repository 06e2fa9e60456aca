#!/bin/bash
# Make a test-bed of real devices without phones: adbd for this machine, and an arm64 Debian with
# adbd, sshd, Python and ONNX Runtime that qemu runs. For the tests in this folder; needs root, apt
# and half a minute, changes nothing of the system but installed packages and binfmt_misc.
#
#   sudo tests/devices/testbed.sh [DIR]      default: build/testbed
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bed=$(realpath -m "${1:-$here/../../build/testbed}")
suite=trixie  # the first Debian with adbd
[ -e "$bed/done" ] && [ "$bed/done" -nt "$0" ] && exit 0
[ "$(id -u)" = 0 ] || { echo "testbed.sh: wants root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "testbed.sh: wants apt" >&2; exit 1; }

needed=(adb openssh-client openssh-server qemu-user-static g++ g++-aarch64-linux-gnu)
if ! dpkg --status "${needed[@]}" >/dev/null 2>&1; then
  apt-get --quiet update
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${needed[@]}"
fi

# Packages of the suite for an architecture, unpacked: no maintainer script runs, no emulation.
# The archive's address is that of this machine's own sources.
mirror=$( (grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt --include='*.list' \
  --include='*.sources' || true) | (grep -v snapshot || true) | head -n 1 | tr -d ' ')
[ -n "$mirror" ] || { echo "testbed.sh: finds no Debian archive in /etc/apt" >&2; exit 1; }
unpack() {
  local architecture=$1 target=$2 scratch
  shift 2
  scratch=$(mktemp -d)
  mkdir -p "$scratch"/{lists/partial,cache/archives/partial} "$target"/usr/{bin,sbin,lib,lib64}
  : > "$scratch/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" \
    > "$scratch/sources.list"
  cat > "$scratch/apt.conf" <<CONFIG
APT::Architecture "$architecture"; APT::Architectures {"$architecture";};
APT::Install-Recommends "false"; APT::Sandbox::User "root"; Acquire::Languages "none";
Dir::Etc::sourcelist "$scratch/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$scratch/lists"; Dir::State::status "$scratch/status"; Dir::Cache "$scratch/cache";
CONFIG
  APT_CONFIG=$scratch/apt.conf apt-get --quiet update >/dev/null
  APT_CONFIG=$scratch/apt.conf apt-get --quiet --yes --download-only install "$@" >/dev/null
  for name in bin sbin lib lib64; do ln -sfn "usr/$name" "$target/$name"; done
  for package in "$scratch"/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$target" --keep-directory-symlink
  done
  rm -rf "$scratch"
}

rm -rf "$bed"
mkdir -p "$bed"
unpack "$(dpkg --print-architecture)" "$bed/native" adbd
unpack arm64 "$bed/arm64" dash coreutils util-linux grep sed procps libc-bin libgomp1 libstdc++6 \
  python3 adbd openssh-server openssh-sftp-server
cc -O2 -shared -fPIC "$here/loopback.c" -o "$bed/native/loopback.so"
aarch64-linux-gnu-gcc -O2 -shared -fPIC "$here/loopback.c" -o "$bed/arm64/loopback.so"

root=$bed/arm64
[ -e "$root/usr/bin/sh" ] || ln -s dash "$root/usr/bin/sh"
mkdir -p "$root"/{proc,sys,dev,tmp,root/.ssh,run/sshd,etc/ssh,data/local/tmp,data/small}
chmod 1777 "$root/tmp"
chmod 700 "$root/root"
printf 'root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n' \
  > "$root/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' > "$root/etc/group"
echo 'PRETTY_NAME="Debian arm64 under qemu"' > "$root/etc/os-release"
printf '#!/bin/sh\necho "[ro.product.manufacturer]: [Testbed]"\necho "[ro.product.model]: [arm64]"\n' \
  > "$root/usr/bin/getprop"
# What else adb's shell has on Android, in the forms of its sources: two services, and the log.
cat > "$root/usr/bin/dumpsys" <<'SERVICE'
#!/bin/sh
case $1 in
  thermalservice) cat <<'TEXT'
IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=20.0, mType=0, mName=AP, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
	Temperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
Current cooling devices from HAL:
Temperature static thresholds from HAL:
	TemperatureThreshold{mType=0, mName=AP, mHotThrottlingThresholds=[NaN, 80.0]}
TEXT
    ;;
  battery) printf 'Current Battery Service state:\n  status: 3\n  Charge counter: %s\n' \
    "$((3000000 - $(cut -d. -f1 /proc/uptime)))"
    printf '  voltage: 4063\n  temperature: 326\n  technology: Li-ion\n' ;;
esac
SERVICE
printf '#!/bin/sh\necho "$3" >> /data/log\n' > "$root/usr/bin/log"  # log -t TAG TEXT
printf '#!/bin/sh\ncat /data/log\n' > "$root/usr/bin/logcat"
chmod 755 "$root"/usr/bin/{getprop,dumpsys,log,logcat}

# The device's own wheels: the versions that this project pins.
python=$(basename "$(readlink "$root/usr/bin/python3")")
wheels=$(mktemp -d)
pins=$(sed -nE 's/^ +(onnxruntime==[0-9.]+); python_version >= .*/\1/p' "$here/../../setup.cfg")
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux2014_aarch64 --python-version "${python#python}" "$pins" "numpy<2.4"
mkdir -p "$root/usr/local/lib/$python/dist-packages"
for wheel in "$wheels"/*.whl; do
  "${PYTHON:-python3}" -m zipfile --extract "$wheel" "$root/usr/local/lib/$python/dist-packages"
done
rm -rf "$wheels"
touch "$bed/done"
