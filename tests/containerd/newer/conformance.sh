#!/usr/bin/env bash
# containerd's own test suite for snapshotters, out of its sources as Debian packages them, against ours.
# Needs golang and golang-github-containerd-containerd-dev; tools/newer installs them.
. "$(dirname "${BASH_SOURCE[0]}")/../parts/harness.sh"

# Packages of Go sources are no modules.
export GO111MODULE=off GOPATH=$WORK/go:/usr/share/gocode GOCACHE=$WORK/go-cache SLUICE TMPDIR=$WORK
mkdir -p "$WORK/go/src/conformance"
cp "$HERE/conformance_test.go" "$WORK/go/src/conformance/"
must "the suite is built" sh -c "cd '$WORK/go/src/conformance' && go test -c -o '$WORK/conformance'"
"$WORK/conformance" -test.v -test.root >"$WORK/conformance.log" 2>&1
status=$?
while read -r verdict name; do
    case $verdict in
        PASS:) ok "$name" ;;
        FAIL:) bad "$name" "$(grep -A 12 "^=== .*$name\$" "$WORK/conformance.log" | tail -n 8)" ;;
    esac
done < <(sed -n 's/^ *--- \([A-Z]*:\) TestAll\/Snapshots\/\([^ ]*\).*/\1 \2/p' "$WORK/conformance.log")
check "it came to its end" test "$status" = 0
finish
