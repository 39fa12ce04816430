#!/usr/bin/env bash
# Makes the folder of an aarch64 machine for qemu-aarch64: Debian's Python, and what evalmode serves with.
#
#     tests/machines/aarch64.sh FOLDER PYTHON
#
# PYTHON has pip. Packages are downloaded and unpacked, and nothing of this system changes: apt has
# its state in FOLDER, where no package is installed, so it brings every library that Python needs.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath --no-symlinks "$2")
checkout=$PWD
mkdir -p "$1"
cd "$1"
rm -rf system packages apt
mkdir -p system packages apt/{lists,cache}/partial apt/cache/archives/partial
touch apt/status

apt=(apt-get -qq -o Dir::State::lists="$PWD/apt/lists" -o Dir::State::status="$PWD/apt/status"
  -o Dir::Cache="$PWD/apt/cache" -o APT::Architecture=arm64 -o APT::Architectures::=arm64
  -o APT::Sandbox::User=root -o Acquire::Languages=none)
"${apt[@]}" update
"${apt[@]}" install --download-only --yes --no-install-recommends python3 libstdc++6
for package in apt/cache/archives/*.deb; do
  dpkg-deb --extract "$package" system
done
rm -r apt

# evalmode itself is read from the checkout, so its dependencies are installed without it.
mapfile -t dependencies < <("$python" -c 'import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], sep="\n")' "$checkout/pyproject.toml")
version=$(basename system/usr/bin/python3.[0-9]*)
"$python" -m pip --disable-pip-version-check install -q -c "$checkout/constraints.txt" --target packages \
  --only-binary=:all: --implementation cp --python-version "${version#python}" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
  onnxruntime "${dependencies[@]}"

# ONNX Runtime reads /proc/cpuinfo for the kind of processor, and QEMU would show this machine's. ONNX
# Runtime 1.28 and 1.31 then end with a segmentation fault (1.24 did not). This is a Neoverse N1.
mkdir system/proc
for processor in 0 1; do
  cat >> system/proc/cpuinfo <<END
processor	: $processor
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

END
done
