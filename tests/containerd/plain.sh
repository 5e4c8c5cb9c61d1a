#!/usr/bin/env bash
# Ordinary images on Debian's containerd with our snapshotter: by ctr and by CRI, unpacked as ever.
. "$(dirname "${BASH_SOURCE[0]}")/parts/harness.sh"

must "the registry starts" registry_start
must "an image is pushed" push plain 1 plain
must "the snapshotter starts without a daemon" snapshotter_start
must "containerd starts with the shipped snippet" containerd_start
check "containerd has both snapshotters" test "$(ctr plugins ls | grep -cE '(nydus|sluice) .* ok')" = 2

# --- ctr

must "ctr pulls" ctr -n test images pull --plain-http --snapshotter nydus "$registry/plain:1"
equal "the upper layer hides and replaces" "hello two" run test "$registry/plain:1" one \
    sh -c 'echo $(cat /etc/word) $(ls /old); test ! -e /etc/gone'
equal "each layer is a snapshot" 2 snapshots test
usage() { ctr -n test snapshots --snapshotter nydus usage; }
check "usage is told" grep -q MiB <(usage)
check "the other name works, too" ctr -n test images pull --plain-http --snapshotter sluice "$registry/plain:1"
check "containers write above the image" run test "$registry/plain:1" two sh -c 'echo x >/etc/word && cat /etc/word'
equal "and not into it" hello run test "$registry/plain:1" three cat /etc/word

# --- CRI

must "CRI pulls" cri pull "$registry/plain:1"
pod=$(cri run-pod pod)
check "a pod runs" test -n "$pod"
container=$(cri create "$pod" main "$registry/plain:1" -- /bin/sleep 1000)
check "a container is made" test -n "$container"
check "and started" cri start "$container"
equal "exec" hello cri exec "$container" -- cat /etc/word
check "the container goes" cri remove "$container"
check "the pod goes" cri remove-pod "$pod"
check "the image goes" cri remove-image "$registry/plain:1"
check "the pod's image goes" cri remove-image "$registry/pause:1"

check "ctr's image goes" ctr -n test images rm --sync "$registry/plain:1"
check "garbage is collected to the last directory" collected "the last directory's end" nothing_kept
check "nothing is mounted" mounted 0
check "the snapshotter stops when told" snapshotter_stop
finish
