#!/bin/bash
# Sums up the log of `go test -v`: what each failed test said, without the logs of the
# programs that it ran, the packages that failed, of which one may not even build, and
# the counts. Fails if no test ran.
set -euo pipefail
log=$1
awk '
	/^=== (RUN|NAME|CONT)/ { test = $3; next }
	/^=== / { next }
	/^ *--- FAIL: / { failed[++n] = $3; why[n] = said[$3]; delete said[$3]; next }
	/^ *--- / { delete said[$3]; next }
	/^FAIL\t/ { packages = packages "\n" $0 }
	/^ +[a-z0-9_]+_test\.go:/ || /DATA RACE|^panic:/ { said[test] = said[test] $0 "\n" }
	END {
		for (i = 1; i <= n; i++) {
			print "\nFAIL " failed[i]
			lines = split(why[i], line, "\n") - 1
			for (l = lines > 20 ? lines - 19 : 1; l <= lines; l++) print substr(line[l], 1, 500)
		}
		if (packages) print packages
	}' "$log"
count() { grep -cE "^ *--- $1" "$log" || true; }
echo
echo "$(count PASS) passed, $(count FAIL) failed, $(count SKIP) skipped; everything is in $log"
[ "$(count PASS)" -gt 0 ] || { echo "no test ran"; exit 1; }
