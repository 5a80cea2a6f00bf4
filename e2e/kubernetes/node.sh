# Process 1 of a node: gives the node its own disk, /run and sysctls, and keeps its
# programs running, as systemd would.
#
#   node.sh NAME DISK LAB PROXY PATH CGROUP…
#
# DISK stays when the node is switched off; LAB is where logs go; PROXY is no if the
# node has no kube-proxy; CGROUP is the group of the node's own programs in each
# controller. /run/<program>.pid holds each program's process id.
set -eu
name=$1 disk=$2 lab=$3 proxy=$4
export PATH="$5:$PATH"
shift 5
for group; do echo 0 >"$group/cgroup.procs"; done
hostname "$name"

# The machine's names of network namespaces would be kept alive by this copy.
umount -R -l /run/netns
mkdir -p "$disk/log"
mount --bind "$lab/log" "$disk/log"
mount -t tmpfs -o mode=0755 twill-lab /run
mkdir -p /run/netns /run/lock
bind() { mkdir -p "$disk/$1" "$2" && mount --bind "$disk/$1" "$2"; }
bind kubelet /var/lib/kubelet
bind containerd /var/lib/containerd
bind cni-state /var/lib/cni
bind cni-conf /etc/cni/net.d
bind cni-bin /opt/cni/bin
bind pod-logs /var/log/pods
bind container-logs /var/log/containers
for f in hosts resolv.conf; do mount --bind "$disk/etc/$f" /etc/$f; done
# What a kubelet sets for the whole machine it finds set: the machine's own stay.
for f in "$disk"/sysctl/*; do
	key=$(basename "$f")
	[ ! -e "/proc/sys/$(echo "$key" | tr . /)" ] || mount --bind "$f" "/proc/sys/$(echo "$key" | tr . /)"
done
mount --make-rshared / # mounts of pods that propagate: to this node, no further

keep() { # NAME COMMAND…
	program=$1
	shift
	while :; do
		"$@" >>"$disk/log/$name-$program.log" 2>&1 </dev/null &
		echo $! >/run/$program.new && mv /run/$program.new /run/$program.pid
		wait $! || echo "[$program ended with $?]" >>"$disk/log/$name-$program.log"
		sleep 0.2
	done &
}
keep containerd containerd --config "$disk/etc/containerd.toml" --log-level warn
until ctr version >/dev/null 2>&1; do sleep 0.05; done
for image in "$disk"/images/*.tar; do
	[ ! -e "$image" ] || { ctr -n k8s.io images import "$image" >/dev/null && rm "$image"; }
done
keep kubelet sh -c 'exec kubelet --config="$1/etc/kubelet.yaml" --kubeconfig="$1/etc/kubelet.kubeconfig" \
	--hostname-override="$(cat "$1/etc/name")" --node-ip="$(cat "$1/etc/node-ip")" --cert-dir=/var/lib/kubelet/pki' kubelet "$disk"
[ "$proxy" = no ] || keep kube-proxy kube-proxy --config="$disk/etc/kube-proxy.yaml"
while :; do
	wait # for everybody's children
	sleep 1
done
