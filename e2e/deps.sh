#!/bin/bash
# Installs what demo and tests need on a fresh Debian 12, and nothing that is there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(iproute2 iptables nftables iputils-ping procps util-linux gcc libc6-dev containernetworking-plugins)
missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
# Debian's etcd is unpacked, not installed: installing it would start it.
etcd=build/etcd-3.4
if [ ${#missing[@]} -gt 0 ] || [ ! -x $etcd/usr/bin/etcd ]; then
	[ "$(id -u)" = 0 ] || { echo "needs root to install: ${missing[*]:-}" >&2; exit 1; }
	echo "installing ${missing[*]:-} and unpacking etcd 3.4"
	apt-get update -qq
fi
if [ ${#missing[@]} -gt 0 ]; then
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
if [ ! -x $etcd/usr/bin/etcd ]; then
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	chmod 777 "$tmp" # apt downloads as its own user
	(cd "$tmp" && apt-get download -qq etcd-server)
	mkdir -p build
	dpkg -x "$tmp"/etcd-server_*.deb $etcd
fi
