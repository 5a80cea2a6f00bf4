#!/bin/bash
# Installs what the demo needs on a fresh Debian 12, with the argument `test` also
# what the tests need, and nothing that is there.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(iproute2 iptables nftables iputils-ping procps util-linux gcc libc6-dev containernetworking-plugins)
# Debian's etcd is unpacked, not installed: installing it would start it. So is the
# kernel of the guest that has what this one lacks.
etcd=build/etcd-3.4 kernel=build/guest/kernel
unpacked=true
if [ "${1:-}" = test ]; then
	packages+=(bird2 frr frr-pythontools wireguard-tools qemu-system-x86 busybox-static cpio kmod containerd runc)
	[ -x $etcd/usr/bin/etcd ] && [ -e $kernel/modules-listed ] || unpacked=false
fi
missing=()
for p in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || ! $unpacked || exit 0
[ "$(id -u)" = 0 ] || { echo "needs root to install: ${missing[*]:-}" >&2; exit 1; }
echo "installing ${missing[*]:-}; unpacking etcd 3.4 and a kernel for the guest: $($unpacked && echo no || echo yes)"
apt-get update -qq
tmp=$(mktemp -d)
policy=/usr/sbin/policy-rc.d
trap 'rm -rf "$tmp"; [ ! -e "$tmp.policy" ] || rm -f "$tmp.policy" $policy' EXIT
chmod 777 "$tmp" # apt downloads as its own user

if [ ${#missing[@]} -gt 0 ]; then
	# The tests run BIRD and FRR where they need them; the machine itself shall not.
	if [ ! -e $policy ]; then
		touch "$tmp.policy"
		printf '#!/bin/sh\nexit 101\n' >$policy
		chmod +x $policy
	fi
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
unpack() { # package, directory
	(cd "$tmp" && apt-get download -qq "$1")
	mkdir -p "$2"
	dpkg -x "$tmp/$1"_*.deb "$2"
}
$unpacked && exit
[ -x $etcd/usr/bin/etcd ] || unpack etcd-server $etcd
if [ ! -e $kernel/modules-listed ]; then
	rm -rf $kernel
	unpack "$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: //p')" $kernel
	/sbin/depmod -b $kernel "$(ls $kernel/lib/modules)"
	touch $kernel/modules-listed
fi
