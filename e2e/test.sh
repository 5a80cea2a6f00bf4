#!/bin/bash
# Runs all tests and counts them. The daemons that the end-to-end tests start are
# built with the race detector, too. Arguments go to `go test`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
log=build/test.log
: >$log

# Some tests need a kube-apiserver. Tests mostly wait for other things, so it is built
# meanwhile, out of what CPU they leave.
chrt --idle 0 e2e/kubernetes/build.sh >build/kubernetes.log 2>&1 &
kubernetes_built=$!

status=0
# On the terminal: a line for each package and failure, to people for each test, too.
shown='^(ok|FAIL|panic:)|--- (FAIL|SKIP)|DATA RACE'
[ ! -t 1 ] || shown+='|^--- PASS'
run() {
	go test -v -count=1 -timeout 40m "$@" 2>&1 | tee -a $log |
		{ grep --line-buffered -E "$shown" || true; }
	return "${PIPESTATUS[0]}"
}
# Programs that find no race need not wait a second for one when they end.
export GORACE=atexit_sleep_ms=0
# A package at a time: they share two cores, and a loaded machine is a bad stopwatch.
# What has no goroutine goes without the race detector: these tests start and trace
# hundreds of processes.
alone='/pkg/(ipam|portmap|cniinstall|ociimage|nettest/faults)$|/plugins/|/manifests'
kubernetes='/pkg/(store|install|nettest/kubeapi)$'
all=$(go list ./pkg/... ./plugins/... ./daemon/... ./manifests/... ./e2e/layers ./e2e/lab)
run -p 1 "$@" $(grep -E "$alone" <<<"$all") || status=1
run -p 1 -race "$@" $(grep -vE "$alone|$kubernetes" <<<"$all") || status=1

mkdir -p build/race
go build -race -o build/race/ ./daemon/cmd/twilld ./daemon/cmd/netctl ./plugins/twill
go build -o build/race/ ./e2e/lab
export TWILL_BIN_DIR="$PWD/build/race" TWILL_ETCD34="$PWD/build/etcd-3.4/usr/bin/etcd"
wait $kubernetes_built || { tail build/kubernetes.log; status=1; } # e2e measures
run -race "$@" ./e2e || status=1
run -p 1 -race "$@" $(grep -E "$kubernetes" <<<"$all") || status=1

guest() {
	CGO_ENABLED=0 go test -c -tags guest -o build/guest/kernel.test ./pkg/kernel || return 1
	e2e/guest.sh build/guest/kernel.test -test.v -test.run '^TestGuest$' 2>&1 | tee -a $log |
		{ grep --line-buffered -E '^(PASS|FAIL|panic:|guest:)|--- (PASS|FAIL|SKIP)|No such file' || true; }
	return "${PIPESTATUS[0]}"
}
echo "in a QEMU guest, what this kernel may lack: IPIP, WireGuard"
guest || status=1

echo "once more, what depends on the store, with Debian's etcd 3.4"
export TWILL_BIN_DIR=$PWD/build/bin TWILL_ETCD_BINARY=$TWILL_ETCD34
run -short -skip TestKube "$@" ./pkg/store || status=1
run -short -run 'TestAdopt|TestBadConfig|TestPoolFull|TestBadPeer|TestStore|TestReservation|TestRenewal|TestOwnKey|TestSamePublicIP|TestOverlappingKeys|TestUplinkAddress|TestRestartAfter|TestEtcd|TestFirstEndpointDead|TestStartTogether|TestConfigChangeLive|TestSurvive' "$@" ./e2e || status=1

e2e/summary.sh $log || status=1
exit $status
