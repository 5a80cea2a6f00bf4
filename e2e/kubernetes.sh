#!/bin/bash
# Runs Twill on real Kubernetes: builds Kubernetes once and keeps it (kubernetes/build.sh),
# builds Twill's image, and runs the tests. Arguments go to `go test`.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS
e2e/kubernetes/build.sh >/dev/null
echo "Kubernetes is there after $((SECONDS - start)) s"
export TWILL_BIN_DIR=${TWILL_BIN_DIR:-$PWD/build/bin} TWILL_IMAGE=${TWILL_IMAGE:-$PWD/build/image/twill.tar}
mkdir -p build
log=build/e2e-kubernetes.log
run() { # a line for each test and each step on the terminal, everything in the log
	go test -v -count=1 -timeout 60m "$@" ./e2e/kubernetes 2>&1 | tee $log |
		{ grep --line-buffered -E '^(=== RUN|ok|FAIL|panic:)|--- (PASS|FAIL|SKIP)|^    [a-z]+(_test)?\.go:|^        [a-z ]+: ' || true; }
	return "${PIPESTATUS[0]}"
}
status=0
run "$@" || status=1
e2e/summary.sh $log || status=1
echo "it took $((SECONDS - start)) s"
exit "$status"
