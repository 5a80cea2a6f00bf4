#!/bin/bash
# Runs every fuzzer of the module for the given time each: fuzz.sh 10s
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-10s}
grep -rl --include='*_test.go' '^func Fuzz' . | while read -r file; do
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' "$file" | while read -r fuzzer; do
		echo "$(dirname "$file") $fuzzer"
		go test -run '^$' -fuzz "^$fuzzer\$" -fuzztime "$time" "$(dirname "$file")" </dev/null
	done
done
