#!/bin/bash
# Runs a command in a QEMU guest with Debian's own kernel, which has what the
# machine's may lack: IPIP, WireGuard. The guest sees this machine's files; what
# it writes is gone when it ends. It has no network but those it makes itself.
#
#   e2e/guest.sh COMMAND [ARGUMENT…]     ends with the command's exit code
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
kernel=$top/build/guest/kernel # unpacked by e2e/deps.sh
version=$(ls "$kernel/lib/modules")
modules=$kernel/lib/modules/$version

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp/initrd"/{bin,mod,proc,ro,rw,new}
cp /bin/busybox "$tmp/initrd/bin/busybox"

# The modules that the guest needs to find its files, each after what it needs.
depends() {
	local m=$1 file
	file=$(find "$modules" -name "$m.ko" -print -quit)
	[ -n "$file" ] || return 0 # built in
	for d in $(/sbin/modinfo -F depends "$file" | tr , ' '); do depends "$d"; done
	grep -qxF "$m" "$tmp/order" || { cp "$file" "$tmp/initrd/mod/"; echo "$m" >>"$tmp/order"; }
}
: >"$tmp/order"
for m in virtio_pci 9pnet_virtio 9p overlay; do depends $m; done

{
	printf 'cd %q\n' "$top"
	for v in TWILL_BIN_DIR TWILL_ETCD_BINARY GORACE; do
		[ -z "${!v:-}" ] || printf 'export %s=%q\n' $v "${!v}"
	done
	printf '%q ' "$@"
} >"$tmp/initrd/command"

# The kernel loads modules by itself when they are asked for: from its root, which
# is the machine's from here on.
cat >"$tmp/initrd/session" <<-EOF
	export HOME=/root PATH=$PATH
	ip link set lo up
	bash /run/command
	echo "guest: exit code \$?"
	busybox poweroff -f
EOF

cat >"$tmp/initrd/init" <<-EOF
	#!/bin/busybox sh
	b=/bin/busybox
	\$b mount -t proc proc /proc
	for m in $(tr '\n' ' ' <"$tmp/order"); do \$b insmod /mod/\$m.ko || echo "guest: no module \$m"; done
	\$b mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro machine /ro
	\$b mount -t tmpfs tmpfs /rw
	\$b mkdir /rw/upper /rw/work
	\$b mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /new
	\$b mkdir -p /new/lib/modules /new/proc /new/sys /new/dev
	\$b ln -sfn $modules /new/lib/modules/$version
	\$b mount -t proc proc /new/proc
	\$b mount -t sysfs sysfs /new/sys
	\$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
	\$b mount -t devtmpfs devtmpfs /new/dev
	\$b mkdir -p /new/dev/pts /new/dev/shm
	\$b mount -t devpts devpts /new/dev/pts
	# Not over /tmp: this tree may be in it.
	for d in dev/shm run; do \$b mount -t tmpfs tmpfs /new/\$d; done
	\$b cp /command /session /new/run/
	exec \$b switch_root /new /bin/bash /run/session
EOF
chmod +x "$tmp/initrd/init"
(cd "$tmp/initrd" && find . | cpio -o -H newc --quiet) >"$tmp/initrd.cpio"

# Emulated: slow, but the same everywhere.
qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp "$(nproc)" -m 3072 -nodefaults -no-reboot -display none -serial stdio -nic none \
	-kernel "$kernel"/boot/vmlinuz-* -initrd "$tmp/initrd.cpio" -append 'console=ttyS0 quiet panic=-1' \
	-virtfs local,path=/,mount_tag=machine,security_model=none,readonly=on,multidevs=remap </dev/null | tr -d '\r' | tee "$tmp/out"
code=$(sed -n 's/^guest: exit code //p' "$tmp/out" | tail -1)
exit "${code:-1}"
