#!/usr/bin/env bash
# Installs what the tests use from the distribution: Prometheus and promtool, the libraries that Mooncake's client loads, `ip` for the
# network namespace in which its servers run, and GlusterFS, the shared directory of the `fs` store's tests. Nothing else of kvtiers
# needs them; without them those tests are skipped. Safe to run again: what is there is left alone. Needs Debian or Ubuntu, and root or
# sudo without a password.
set -euo pipefail

packages=(prometheus libibverbs1 libnuma1 libcurl4 iproute2 glusterfs-client)
commands=(prometheus promtool ip glusterfs)
libraries=(libibverbs.so.1 libnuma.so.1 libcurl.so.4)
PATH="$PATH:/usr/sbin:/sbin"

find_missing() {
  missing=()
  for command in "${commands[@]}"; do
    command -v "$command" >/dev/null || missing+=("$command")
  done
  loadable=$(ldconfig -p)
  for library in "${libraries[@]}"; do
    [[ $loadable == *"$library"* ]] || missing+=("$library")
  done
}
find_missing
if [ ${#missing[@]} -eq 0 ]; then
  echo "system packages: nothing to install"
  exit 0
fi

need() {
  echo "system packages: ${missing[*]} not found, and $1." >&2
  echo "As root, on Debian or Ubuntu: apt-get install -y --no-install-recommends ${packages[*]}" >&2
  exit 1
}

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  sudo -n true 2>/dev/null || need "this is neither root nor may it use sudo without a password"
  as_root=(sudo -n)
fi
command -v apt-get >/dev/null || need "there is no apt-get"

# The tests start a Prometheus of their own; the package would start one as a daemon. This is how Debian is told not to (101: forbidden).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
fi

install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
}
# The lists of packages may be missing (a fresh container) or old.
install 2>/dev/null || { "${as_root[@]}" apt-get update -qq && install; } || need "apt-get could not install them"
if [ -d /run/systemd/system ]; then # nor at the next boot
  "${as_root[@]}" systemctl --quiet disable prometheus || true
fi
find_missing
[ ${#missing[@]} -eq 0 ] || need "apt-get has installed ${packages[*]} without it"
echo "system packages: installed ${packages[*]}"
