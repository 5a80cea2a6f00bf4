#!/bin/bash
# Builds real Kubernetes for the tests: static programs as Go modules, in the versions that
# modules/*/go.mod say, three images, and a containerd root with the images. All of it is
# kept outside of the clone, and only what is missing is built. The last line is the folder.
#
#   e2e/kubernetes/build.sh             everything
#   e2e/kubernetes/build.sh PROGRAM…    only these
#
# TWILL_KUBERNETES is where to keep it: /var/tmp/twill-kubernetes. Two callers do not build
# the same: the second waits. About 25 minutes on two cores from nothing.
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD
say() { printf '%s  %s\n' "$(date +%T)" "$*" >&2; }

version() { sed -nE "s#^(require)?\s*$1 v([^ ]+).*#\2#p" modules/"$2"/go.mod; }
kubernetes=$(version k8s.io/kubernetes kubernetes)
coredns=$(version github.com/coredns/coredns coredns)
folder=${TWILL_KUBERNETES:-/var/tmp/twill-kubernetes}/kubernetes-$kubernetes-coredns-$coredns
bin=$folder/bin
mkdir -p "$bin"
# The first are those that other tests wait for.
all="kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl agnhost coredns"

locked() { # runs a function if its result is not there, one caller at a time
	[ ! -e "$1" ] || return 0
	local lock
	exec {lock}>"$folder/lock"
	flock -n "$lock" || { say "waiting for another build of Kubernetes"; flock "$lock"; }
	[ -e "$1" ] || "${@:2}"
	exec {lock}>&-
}

build() { # program
	local module=kubernetes package=k8s.io/kubernetes/cmd/$1 flags="-s -w" v start=$SECONDS
	case $1 in
	coredns) module=coredns package=github.com/coredns/coredns ;;
	agnhost) package=k8s.io/kubernetes/test/images/agnhost ;;
	esac
	# What the programs say of themselves, which others judge them by.
	for v in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
		[ $module = kubernetes ] || break
		flags+=" -X $v.gitVersion=v$kubernetes -X $v.gitMajor=${kubernetes%%.*} -X $v.gitMinor=$(cut -d. -f2 <<<"$kubernetes")"
		flags+=" -X $v.gitCommit=$(printf '%040d' 0) -X $v.gitTreeState=archive -X $v.buildDate=2026-01-01T00:00:00Z"
	done
	say "building $1 ($module ${!module})"
	# Without debugging information, and with less garbage collection, two fifths of the
	# compiler's time are saved.
	(cd modules/$module && CGO_ENABLED=0 GOFLAGS=-mod=readonly GOWORK=off GOGC=${GOGC:-400} \
		go build -trimpath -buildvcs=false -gcflags=all=-dwarf=false -ldflags "$flags" -o "$bin/.$1" $package >&2)
	mv "$bin/.$1" "$bin/$1"
	say "built $1 in $((SECONDS - start)) s"
}

seed() { # directory
	local start=$SECONDS tmp=$folder/.seed.new state=$folder/.seed.state pid
	rm -rf "$tmp" "$state"
	mkdir -p "$tmp/root" "$state"
	(cd ../.. && go run ./e2e/kubernetes/images "$bin" "$state" >&2)
	printf 'version = 2\nroot = "%s"\nstate = "%s"\n[grpc]\n  address = "%s"\n' "$tmp/root" "$state/run" "$state/sock" >"$state/config.toml"
	unshare --mount --propagation private containerd --config "$state/config.toml" --log-level error >"$state/log" 2>&1 &
	pid=$!
	trap 'kill '$pid EXIT
	until ctr --address "$state/sock" version >/dev/null 2>&1; do
		kill -0 $pid || { cat "$state/log" >&2; exit 1; }
		sleep 0.1
	done
	for image in "$state"/*.tar; do ctr --address "$state/sock" --namespace k8s.io images import "$image" >&2; done
	kill $pid
	wait $pid || true
	trap - EXIT
	mv "$tmp/root" "$1"
	rm -rf "$tmp" "$state"
	say "made images in $((SECONDS - start)) s"
}

for program in ${*:-$all}; do
	[[ " $all " = *" $program "* ]] || { echo "build $program: it is one of $all" >&2; exit 2; }
	locked "$bin/$program" build "$program"
done
if [ $# = 0 ]; then
	seed=$folder/seed-$(cat images/*.go ../../pkg/ociimage/*.go /bin/busybox | sha256sum | cut -c1-12)
	locked "$seed" seed "$seed"
	[ "$(readlink "$folder/seed" || true)" = "$seed" ] || { ln -sfn "$seed" "$folder/.seed" && mv -T "$folder/.seed" "$folder/seed"; }
fi
echo "$folder"
