#!/usr/bin/env bash
# Install the system packages that pictures without a GPU need: bash tools/system_packages.sh
#
# SAPIEN draws through Vulkan, MuJoCo through EGL or OSMesa. Without a GPU, Mesa's software drivers do both. SAPIEN needs Mesa >= 23.1, the first whose
# software Vulkan ("lavapipe") has descriptor indexing; Debian 12 has it in its backports only. Where a GPU driver brings its own Vulkan, nothing is replaced.
# What is there already is left alone, so a second call changes nothing. Without root, or on another distribution, this prints what to do and exits with 0.
set -euo pipefail

LAVAPIPE_MESA=23.1
PYTHON=${PYTHON:-python3}

say() { printf 'system packages: %s\n' "$*"; }

if [ "$(uname -s)" != Linux ]; then
    say "nothing to install on $(uname -s)"
    exit 0
fi

libraries=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2> /dev/null || true)
has_library() { grep -q "[[:space:]]$1" <<< "$libraries"; }

# A GPU driver's own Vulkan: NVIDIA's or AMD's closed driver registers itself; for AMD and Intel, Mesa's driver is the GPU's own.
gpu_vulkan() {
    local file node
    for file in /usr/share/vulkan/icd.d/nvidia*.json /etc/vulkan/icd.d/nvidia*.json /usr/share/vulkan/icd.d/amd_icd*.json /etc/vulkan/icd.d/amd_icd*.json; do
        [ -e "$file" ] && return 0
    done
    for node in /sys/class/drm/renderD*/device/vendor; do
        [ -e "$node" ] && grep -qE '0x(1002|8086)' "$node" && [ -n "$(mesa_vulkan)" ] && return 0
    done
    return 1
}

mesa_vulkan() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }

candidate() { LC_ALL=C apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" {print $2; exit}'; }

# A copy of the machine's own Debian source with the backports suite in it, so that a mirror stays a mirror.
backports_source() {
    local codename=$1 file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        awk -v suite="$codename" 'BEGIN {RS = ""; FS = "\n"}
            {
                wanted = 0
                for (i = 1; i <= NF; i++) if ($i ~ /^Suites:/ && ($i " ") ~ ("[ :]" suite "[ ]")) wanted = 1
                if (!wanted) next
                for (i = 1; i <= NF; i++) print ($i ~ /^Suites:/) ? "Suites: " suite "-backports" : $i
                exit
            }' "$file" > /etc/apt/sources.list.d/vlahub-backports.sources
        [ -s /etc/apt/sources.list.d/vlahub-backports.sources ] && return 0
        rm -f /etc/apt/sources.list.d/vlahub-backports.sources
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -e "$file" ] || continue
        if grep -m 1 -E "^deb .*[[:space:]]$codename[[:space:]]" "$file" | sed -E "s/[[:space:]]$codename[[:space:]]/ $codename-backports /" \
            > /etc/apt/sources.list.d/vlahub-backports.list; then
            return 0
        fi
        rm -f /etc/apt/sources.list.d/vlahub-backports.list
    done
    return 1
}

# ------------------------------------------------------------------------------------------------ what is missing
packages=()
has_library libvulkan.so.1 || packages+=(libvulkan1)
has_library libEGL.so.1 || packages+=(libegl1)
has_library libGL.so.1 || packages+=(libgl1)
has_library libgthread-2.0.so.0 || packages+=(libglib2.0-0) # for OpenCV, which SAPIEN brings
has_library libOSMesa.so || packages+=(libosmesa6)
if command -v "$PYTHON" > /dev/null && ! "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null; then
    packages+=("python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv")
fi
vulkan=""
if ! gpu_vulkan; then
    installed=""
    command -v dpkg-query > /dev/null && installed=$(mesa_vulkan)
    if [ -z "$installed" ] || dpkg --compare-versions "${installed#*:}" lt "$LAVAPIPE_MESA"; then
        vulkan=mesa-vulkan-drivers
    fi
fi
if [ "${#packages[@]}" = 0 ] && [ -z "$vulkan" ]; then
    exit 0
fi

# ------------------------------------------------------------------------------------------------ who can install it
if ! command -v apt-get > /dev/null; then
    say "this is neither Debian nor Ubuntu. With your package manager, install what is missing of: the Vulkan loader, Mesa >= $LAVAPIPE_MESA with its"
    say "software Vulkan driver (lavapipe), EGL, GL and OSMesa, GLib. Going on without; 'vlahub doctor' tells what works."
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    say "missing: ${packages[*]} $vulkan. Only root can install them. Run"
    say "    sudo bash $(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
    say "Going on without; 'vlahub doctor' tells what works."
    exit 0
fi

# ------------------------------------------------------------------------------------------------ install it
export DEBIAN_FRONTEND=noninteractive
say "installing ${packages[*]} $vulkan"
apt-get update -qq
release=()
if [ -n "$vulkan" ]; then
    offered=$(candidate "$vulkan")
    if [ -z "$offered" ] || dpkg --compare-versions "${offered#*:}" lt "$LAVAPIPE_MESA"; then
        codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
        if ! grep -qF "n=$codename-backports" <<< "$(LC_ALL=C apt-cache policy)"; then
            say "$codename offers Mesa ${offered:-none}, rendering needs >= $LAVAPIPE_MESA: adding $codename-backports to the apt sources"
            backports_source "$codename" || { say "found no source for $codename in /etc/apt to copy; add $codename-backports by hand and run this again"; exit 1; }
            apt-get update -qq
        fi
        release=(-t "$codename-backports")
    fi
    packages+=("$vulkan")
fi
wanted=()
for package in "${packages[@]}"; do
    # Mesa 25.1 dropped OSMesa; EGL does the same work
    if [ "$package" = libosmesa6 ] && [ -z "$(candidate libosmesa6)" ]; then
        say "this release has no OSMesa; MuJoCo draws through EGL"
    else
        wanted+=("$package")
    fi
done
if [ "${#wanted[@]}" != 0 ]; then
    apt-get install -y -qq --no-install-recommends "${release[@]}" "${wanted[@]}" > /dev/null
fi
say "done"
