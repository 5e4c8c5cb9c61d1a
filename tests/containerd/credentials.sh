#!/usr/bin/env bash
# A registry that wants to know who asks: credentials out of Docker's configuration, by `sluice pull` and through CRI.
. "$(dirname "${BASH_SOURCE[0]}")/parts/harness.sh"

RANDOM_SHA=$(sed -n "s/^'big\/random-5m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")
pull() { "$SLUICE" pull --address "$CONTAINERD" --namespace test "$@"; }
remember() { # PASSWORD
    mkdir -p "$HOME/.docker"
    printf '{"auths": {"%s": {"auth": "%s"}}}' "$registry" "$(printf 'someone:%s' "$1" | base64)" >"$HOME/.docker/config.json"
}

must "the registry is filled while it is open" registry_start
must "with a lazily loadable image" push zstd 1 nydus "$FIXTURES/zstd-64k"
stop "$registry_pid"
for auth in basic bearer; do
    must "$auth: the registry asks for a password" registry_start --auth "$auth" --user someone:secret
    must "$auth: the daemon starts" daemon_start
    must "$auth: the snapshotter starts" snapshotter_start
    must "$auth: containerd starts" containerd_start
    rm -rf "$HOME/.docker"
    refuse "$auth: nobody is refused" "wants a user|answered 40[13]|denied" pull "$registry/zstd:1"
    remember wrong
    refuse "$auth: a wrong password is refused" "wants a user|answered 40[13]|denied" pull "$registry/zstd:1"
    remember secret
    check "$auth: sluice pull" pull "$registry/zstd:1"
    equal "$auth: it runs" "$RANDOM_SHA  /big/random-5m" \
        run test "$registry/zstd:1" one /busybox sha256sum /big/random-5m
    check "$auth: the image goes" ctr -n test images rm --sync "$registry/zstd:1"
    # What pulls has a pod's secret; what reads later has Docker's configuration.
    check "$auth: CRI pulls the pod's image" cri pull --user someone:secret "$registry/pause:1"
    check "$auth: CRI pulls" cri pull --user someone:secret "$registry/zstd:1"
    pod=$(cri run-pod "$auth")
    container=$(cri create "$pod" main "$registry/zstd:1" --mount /bin/busybox:/busybox -- /busybox sleep 1000)
    check "$auth: a container starts" cri start "$container"
    equal "$auth: it reads right" "$RANDOM_SHA  /big/random-5m" cri exec "$container" -- /busybox sha256sum /big/random-5m
    check "$auth: the pod goes" cri remove-pod "$pod"
    check "$auth: the image goes" cri remove-image "$registry/zstd:1"
    check "$auth: the pod's image goes" cri remove-image "$registry/pause:1"
    check "$auth: nothing is kept" collected "the last directory's end" nothing_kept
    check "$auth: nothing is mounted" mounted 0
    for pid in "$containerd_pid" "$snapshotter_pid" "$daemon_pid" "$registry_pid"; do stop "$pid"; done
    rm -rf "$WORK/cache" "$WORK/state"
done
finish
