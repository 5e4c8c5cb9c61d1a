#!/usr/bin/env bash
# What tools/deploy ships is what runs: the systemd unit's command, the DaemonSet's commands in mount namespaces as pods
# have them, containerd's snippet as it is. Nothing is overridden; this suite has a /var/lib of its own instead.
. "$(dirname "${BASH_SOURCE[0]}")/parts/harness.sh"

RANDOM_SHA=$(sed -n "s/^'big\/random-5m' [^ ]* [^ ]* [^ ]* [^ ]* \([0-9a-f]*\) .*/\1/p" "$FIXTURES/tree.txt")
MANIFEST=$DEPLOY/kubernetes.yaml
ROOT=/var/lib/sluice-snapshotter
mkdir "$WORK/lib"
mount --bind "$WORK/lib" /var/lib
mount --make-shared /var/lib

manifest() { python3 "$HERE/manifest.py" "$MANIFEST" "$@"; }

# The command of a unit, with our program for the installed one.
unit_command() { # UNIT
    sed -n "s|^ExecStart=/usr/local/bin/sluice |$SLUICE |p" "$DEPLOY/$1"
}

# The command of a pod's container in a mount namespace of its own, which shares with the node what the manifest says.
# A mount that is shared is prepared aside and moved into place: made there at once it would show up on the node itself.
pod_start() { # CONTAINER
    local -a command
    mapfile -t command < <(manifest command "$1" | sed "1s|^sluice\$|$SLUICE|")
    mkdir -p /run/aside
    unshare --mount --propagation unchanged bash -ec '
        mapfile -t mounts
        for index in "${!mounts[@]}"; do
            read -r host inside propagation <<<"${mounts[index]}"
            mkdir -p "$host" "/run/aside/$index"
            [ "$host" = "$inside" ]
            if [ "$propagation" = Bidirectional ]; then mount --rbind "$host" "/run/aside/$index"; fi
        done
        mount --make-private /var/lib
        for index in "${!mounts[@]}"; do
            read -r host inside propagation <<<"${mounts[index]}"
            if [ "$propagation" = Bidirectional ]; then mount --move "/run/aside/$index" "$inside"; fi
        done
        exec "$@"' pod "${command[@]}" < <(manifest mounts "$1") >>"$WORK/$1.log" 2>&1 &
    pod_pid=$!
    disown
}

must "the registry starts" registry_start
must "a lazily loadable image is pushed" push zstd 1 nydus "$FIXTURES/zstd-64k"

# --- systemd

command=$(unit_command sluice-snapshotter.service)
check "the unit starts our program" test -n "$command"
check "its options make sense" $command --check
refuse "and others are refused" "unexpected argument" $command --check --no-such-option
if command -v systemd-analyze >/dev/null; then
    sed "s|/usr/local/bin/sluice|$SLUICE|" "$DEPLOY/sluice-snapshotter.service" >"$WORK/sluice-snapshotter.service"
    check "systemd reads the unit" systemd-analyze verify "$WORK/sluice-snapshotter.service"
fi
check "containers outlive it" grep -qx "KillMode=process" "$DEPLOY/sluice-snapshotter.service"
must "the daemon starts" daemon_start
$command >>"$WORK/snapshotter.log" 2>&1 &
snapshotter_pid=$!
disown
must "the unit's command serves" wait_for "the socket" listens /run/sluice-snapshotter/nydus.sock
must "containerd starts with the snippet as it is" containerd_start
check "an image is pulled" "$SLUICE" pull -n test "$registry/zstd:1"
equal "and runs" "$RANDOM_SHA  /big/random-5m" run test "$registry/zstd:1" one /busybox sha256sum /big/random-5m
check "the image goes" ctr -n test images rm --sync "$registry/zstd:1"
check "nothing is kept" collected "the last directory's end" nothing_kept
containerd_stop
snapshotter_stop
daemon_stop

# --- Kubernetes

check "the manifest is sound" manifest check
check "the snapshotter's options make sense" "$SLUICE" $(manifest command snapshotter | tail -n +2) --check
check "the daemon's options exist" "$SLUICE" $(manifest command daemon | tail -n +2) --help
pod_start daemon
daemon_pid=$pod_pid
pod_start snapshotter
snapshotter_pid=$pod_pid
must "the daemon's pod listens where the manifest says" wait_for "the socket" listens /run/sluice/api.sock
must "so does the snapshotter's" wait_for "the socket" listens /run/sluice-snapshotter/nydus.sock
SOCKET=/run/sluice/api.sock
must "containerd starts" containerd_start
check "CRI pulls" cri pull "$registry/zstd:1"
pod=$(cri run-pod pod)
container=$(cri create "$pod" main "$registry/zstd:1" --mount /bin/busybox:/busybox -- /busybox sleep 1000)
check "a container starts on a mount out of a pod" cri start "$container"
equal "it reads right" "$RANDOM_SHA  /big/random-5m" cri exec "$container" -- /busybox sha256sum /big/random-5m
check "the mount is seen on the node" mounted 1
check "the pod goes" cri remove-pod "$pod"
check "the mount goes" collected "the unmounting" mounted 0
check "the image goes" cri remove-image "$registry/zstd:1"
check "the pod's image goes" cri remove-image "$registry/pause:1"
check "nothing is kept" collected "the last directory's end" nothing_kept
check "the snapshotter stops when told" snapshotter_stop
check "the daemon stops when told" daemon_stop

# --- containerd 2

check "the snippet for containerd 2 is TOML with what the other has" python3 -c "
import sys, tomllib
old, new = (tomllib.load(open('$DEPLOY/' + name, 'rb')) for name in ('containerd-1.6.toml', 'containerd-2.toml'))
assert new['proxy_plugins'].keys() == old['proxy_plugins'].keys()
for name, plugin in new['proxy_plugins'].items():
    assert plugin['address'] == old['proxy_plugins'][name]['address'] == f'/run/sluice-snapshotter/{name}.sock'
    assert plugin['exports']['enable_remote_snapshot_annotations'] == 'true'
cri = old['plugins']['io.containerd.grpc.v1.cri']['containerd']
assert new['plugins']['io.containerd.cri.v1.images'] == cri
"
finish
