#!/bin/bash
# Get Debian's Swift compiler, as far as checking types needs it: DIR/swiftc, for tests/test_ios.py.
# Needs apt and the headers of the C library, no root. It downloads 470 MB, takes a minute and
# 900 MB of disk, and changes nothing of the system.
#
#   tests/ios/swift.sh [DIR]      default: build/swift
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(realpath -m "${1:-$here/../../build/swift}")
suite=trixie  # the first Debian with Swift 6
[ -e "$out/swiftc" ] && [ "$out/swiftc" -nt "$0" ] && exit 0
command -v apt-get >/dev/null || { echo "swift.sh: wants apt" >&2; exit 1; }

# The archive's address is that of this machine's own sources.
mirror=$( (grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt --include='*.list' \
  --include='*.sources' || true) | (grep -v snapshot || true) | head -n 1 | tr -d ' ')
[ -n "$mirror" ] || { echo "swift.sh: finds no Debian archive in /etc/apt" >&2; exit 1; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/{lists/partial,cache/archives/partial,debs}
: > "$scratch/status"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" \
  > "$scratch/sources.list"
cat > "$scratch/apt.conf" <<CONFIG
APT::Sandbox::User "$(id -un)"; Acquire::Languages "none";
Dir::Etc::sourcelist "$scratch/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::State::lists "$scratch/lists"; Dir::State::status "$scratch/status"; Dir::Cache "$scratch/cache";
CONFIG
export APT_CONFIG=$scratch/apt.conf
apt-get --quiet update >/dev/null
# The compiler, and the libraries of its own release that it loads.
(cd "$scratch/debs" && apt-get --quiet download \
  swiftlang libswiftlang libc6 libgcc-s1 libstdc++6 libtinfo6 libuuid1 libzstd1 zlib1g >/dev/null)

rm -rf "$out"
root=$out/root
mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
for package in "$scratch"/debs/*.deb; do
  case $package in
    */swiftlang_*) part=(--wildcards './usr/libexec/swift/bin/swift-frontend'
      './usr/libexec/swift/lib/swift' './usr/libexec/swift/lib/clang') ;;
    *) part=(--exclude './usr/share') ;;
  esac
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink "${part[@]}"
done

swift=$root/usr/libexec/swift
loader=$(find "$root/usr" -name 'ld-linux-*.so.*' | head -n 1)
libraries=$(dirname "$(find "$root/usr/lib" -name 'libc.so.6' | head -n 1)")
cat > "$out/swiftc" <<WRAPPER
#!/bin/sh
# Compiles with Debian's Swift and this machine's C library: swiftc -typecheck FILE
exec "$loader" --library-path "$swift/lib/swift/host:$swift/lib/swift/linux:$libraries" \\
  "$swift/bin/swift-frontend" -frontend -resource-dir "$swift/lib/swift" -sdk / "\$@"
WRAPPER
chmod +x "$out/swiftc"
