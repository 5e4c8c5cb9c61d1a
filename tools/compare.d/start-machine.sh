# One cold start of a container in a machine of its own, for `tools/compare start`, which reads the outcome:
# start-machine.sh SIDE REGISTRY_TREE FAULT_RULES ORDER OUTCOME STARTS
# What is started before the clock: the registry, containerd, the snapshotter, and on our side the daemon, all without a cache.
# Side `again` has what daemons of side `sluice` have kept of the image's starts in the folder STARTS.

# shellcheck shell=bash

# What an operator's daemons log, not what the suites want to read.
export LOG_LEVEL=info
. "$(dirname "${BASH_SOURCE[0]}")/../../tests/containerd/parts/harness.sh"

side=$1 tree=$2 rules=$3 order=$4 outcome=$5 starts=$6

drop_caches() {
    # What an earlier start wrote is not to be written during this one.
    sync
    echo 3 >/proc/sys/vm/drop_caches
}

# Its end takes only the link away.
ln -s "$tree" "$WORK/registry"
must "the page cache is empty" drop_caches
# With an option it is not filled with the suites' images.
must "the registry starts" registry_start --port 0
must "the snapshotter starts" snapshotter_start
mkdir -p "$WORK/state"
if [ "$side" = again ]; then must "there is a kept start" cp -r "$starts" "$WORK/state/starts"; fi
if [ "$side" != plain ]; then must "the daemon starts" daemon_start --door fanotify; fi
must "containerd starts" containerd_start
must "the registry is as far as wanted" break_registry "$rules"
must "the container starts" python3 "$TOP/tools/compare.d/start-clock.py" "$order" "$outcome" "$registry" "$control" \
    "$SLUICE" "$CONTAINERD" "$CGROUP"
if [ "$side" = sluice ] && [ ! -e "$starts" ]; then
    must "the daemon stops" daemon_stop
    must "it has kept the start" cp -r "$WORK/state/starts" "$starts"
fi
finish
