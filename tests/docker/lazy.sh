#!/usr/bin/env bash
# Lazily loaded images on Debian's dockerd, the Nydus guide's way without its JSON by hand: pull, run, build upon, commit,
# push, save; many containers at once; plugin, Docker and daemon restarted and killed; nothing left at the end.
# Through the door the machine has: fanotify natively, /dev/cachefiles in the guest. FIXTURES names the folder of images.
. "$(dirname "${BASH_SOURCE[0]}")/parts/docker.sh"

. "$HERE/lazy.sh"
RUN="run --network host --rm"

# --- pull and run

check "systemd takes the units" systemd_accepts
must "the registry starts" registry_start
must "the daemon starts" daemon_start
must "the plugin listens" plugin_start
must "Docker starts with the guide's driver name" docker_start
for kind in $KINDS; do
    must "$kind is pushed" lazy_push "$kind"
    must "$kind is pulled" docker pull -q "$REGISTRY/lazy/$kind:v6-docker"
    must "$kind is built upon" lazy_build "$kind"
done
check "pulling and building fetches nothing of the blobs" test "$(counter fetched_bytes)" = 0
check "nothing stays mounted" wait_for "the last unmount" no_mounts
before=$(counter fetched_bytes)
equal "a file of a lazy image is read" "$(sum_of sizes/4096)" \
    docker $RUN app-zstd-64k sh -c 'cd /; sha256sum ./sizes/4096'
fetched=$(($(counter fetched_bytes) - before))
size=$(stat -c %s "$FIXTURES"/zstd-64k/????????????????????????????????????????????????????????????????)
echo "fetched $fetched of $size bytes"
check "far fewer bytes were fetched than the image has" test "$fetched" -gt 0 -a "$fetched" -lt $((size / 4))
check "nothing stays mounted after the container" wait_for "the last unmount" no_mounts
check "the daemon has forgotten the image" registered 0
docker run -d --network host --name half app-zran sleep 1000 >/dev/null
equal "a container reads a file" "$(sum_of sizes/4096)" docker exec half sh -c 'cd /; sha256sum ./sizes/4096'
daemon_kill
must "the daemon starts after it was killed" daemon_start
equal "the container reads all others from its successor" "" docker exec half sh -c \
    'cd /; sha256sum -c /tools/sums >/tmp.out || head /tmp.out'
docker rm -f half >/dev/null
docker run -d --network host --name half app-lz4-1m sleep 1000 >/dev/null
check "the daemon stops in order" stop "$daemon_pid"
must "and starts again" daemon_start
equal "a container reads everything from its successor" "" docker exec half sh -c \
    'cd /; sha256sum -c /tools/sums >/tmp.out || head /tmp.out'
docker rm -f half >/dev/null
for kind in $KINDS; do
    equal "every file of $kind is right" "" docker $RUN "app-$kind"
done
equal "docker inspect says where it is from" "http://$REGISTRY/lazy/zran" docker inspect -f \
    '{{.GraphDriver.Data.LazyOrigin}}' app-zran

# --- change, commit, save, push

check "a container changes the image" docker run --network host --name changed app-lz4-1m sh -c \
    'cd /; rm ./big/text-7m; echo more >>./sizes/4096; mkdir new; rm -r deep; mkdir deep; touch deep/mine'
equal "docker diff tells it" "C /big
D /big/text-7m
C /deep
D /deep/d0
A /deep/mine
A /new
C /sizes
C /sizes/4096" docker diff changed
check "it is committed" docker commit changed "$REGISTRY/changed:1"
check "it is pushed" docker push -q "$REGISTRY/changed:1"
check "it is saved" docker save -o "$WORK/saved.tar" "$REGISTRY/changed:1"
identity=$(docker images -q --no-trunc "$REGISTRY/changed:1")
docker rm changed >/dev/null
for image in "$REGISTRY/changed:1" app-lz4-1m "$REGISTRY/lazy/lz4-1m:v6-docker"; do
    check "$image is removed" docker rmi "$image"
done
check "it is loaded" docker load -i "$WORK/saved.tar"
equal "and is the same" "$identity" docker images -q --no-trunc "$REGISTRY/changed:1"
look='cd /; ls big deep; head -c 5 ./sizes/4096 | wc -c; sha256sum ./big/random-5m'
looked="big:
link
random-5m

deep:
mine
5
$(sum_of big/random-5m)"
equal "and reads what was not changed from where it came" "$looked" docker $RUN "$REGISTRY/changed:1" sh -c "$look"
check "it is exported whole" bash -c "/usr/bin/docker create --name out app-zstd-64k && /usr/bin/docker export out |
    tar -xO big/text-7m | sha256sum | grep -q '$(sum_of big/text-7m | cut -d' ' -f1)'"
docker rm out >/dev/null
docker rmi "$REGISTRY/changed:1" >/dev/null
must "lz4-1m is pulled again" docker pull -q "$REGISTRY/lazy/lz4-1m:v6-docker"
must "lz4-1m is built upon again" lazy_build lz4-1m

# --- ten containers of three images at once

start_ten() {
    local number kind
    for number in 0 1 2 3 4 5 6 7 8 9; do
        # shellcheck disable=SC2086
        set -- $KINDS
        shift $((number % 3))
        kind=$1
        docker run -d --network host --name "ten-$number" "app-$kind" sh -c \
            'while [ ! -e /stop ]; do cd /; sha256sum -c /tools/sums >/out || exit 3; touch /round; sleep 1; done' &
    done
    wait $(jobs -p | grep -v -x -e "$plugin_pid" -e "$docker_pid" -e "$registry_pid" -e "$daemon_pid")
}

# all_go_on: each of them has read everything once more since now.
all_go_on() {
    local number
    for number in 0 1 2 3 4 5 6 7 8 9; do
        rm -f "/proc/${pids[$number]}/root/round"
    done
    for number in 0 1 2 3 4 5 6 7 8 9; do
        wait_for "container $number's next round" test -e "/proc/${pids[$number]}/root/round" || return 1
    done
}

check "ten containers start at once" start_ten
mapfile -t pids < <(for number in 0 1 2 3 4 5 6 7 8 9; do docker inspect -f '{{.State.Pid}}' "ten-$number"; done)
check "all of them read everything right" all_go_on
check "each image is mounted once" images_mounted 3
plugin_kill
check "they go on without the plugin" all_go_on
must "the plugin starts again" plugin_start
equal "and starts new containers" "$(sum_of sizes/4096)" docker $RUN app-zran sh -c 'cd /; sha256sum ./sizes/4096'
check "the old ones go on" all_go_on
docker rm -f ten-0 ten-3 ten-6 >/dev/null
check "the others go on" test "$(docker ps -q | wc -l)" = 7
docker rm -f ten-9 >/dev/null
check "an image goes with its last container" wait_for "its unmount" images_mounted 2

# --- the daemon away

daemon_kill
refuse "a container of an image not mounted waits and then says why" "no daemon listens there" \
    env PATIENCE_S=90 docker $RUN app-lz4-1m echo never
check "it left nothing" bash -c "! grep ' - erofs ' /proc/self/mountinfo | grep -q lz4"
(sleep 3; exec true) &
waiting=$!
docker $RUN app-lz4-1m echo waited >"$WORK/waited" 2>&1 &
starting=$!
wait "$waiting"
must "the daemon starts again" daemon_start
wait "$starting"
equal "a start that waited for the daemon succeeds" waited cat "$WORK/waited"

# --- what happens at a start is the operator's choice

# Docker makes a container's first layer and wants to see it before it tells anybody of the container.
is_trying() {
    ls -d "$HOME_DIR"/layers/*-init
}
# How many starts the plugin said it has to wait with.
waits() {
    grep -c "a start waits" "$WORK/plugin.log"
}
has_waited() {
    [ "$(waits)" -gt "$waits_before" ]
}

echo "{\"repositories\": {\"$REGISTRY/lazy/zstd-64k\": {\"start\": \"fail\"}}}" >/etc/sluice/docker.json
stop "$plugin_pid"
must "the plugin starts with a setting" plugin_start
docker ps -aq | xargs -r /usr/bin/docker rm -f >/dev/null
check "all images are unmounted" wait_for "the last unmount" no_mounts
stop "$registry_pid"
began=$SECONDS
refuse "without its registry an image of that setting does not start" "$REGISTRY" docker $RUN app-zstd-64k echo never
check "and says so soon" test $((SECONDS - began)) -lt 30
equal "another one does: what is here is read" "$(sum_of sizes/4096)" docker $RUN app-zran sh -c 'cd /; sha256sum ./sizes/4096'
must "the registry starts again" registry_start
equal "then the first starts, too" "$(sum_of sizes/4096)" docker $RUN app-zstd-64k sh -c 'cd /; sha256sum ./sizes/4096'

docker ps -aq | xargs -r /usr/bin/docker rm -f >/dev/null
check "all images are unmounted" wait_for "the last unmount" no_mounts
echo "{\"repositories\": {\"$REGISTRY/lazy/lz4-1m\": {\"start\": \"full\"}}}" >/etc/sluice/docker.json
stop "$plugin_pid"
must "the plugin starts with another setting" plugin_start
check "the daemon stops" stop "$daemon_pid"
rm -r "$WORK"/state/*
must "and starts with nothing in its cache" daemon_start
stop "$registry_pid"
full_before=$(counter starts_full) waits_before=$(waits)
docker run -d --network host --name whole app-lz4-1m sleep 1000 >"$WORK/whole" 2>&1 &
starting=$!
check "a start without its registry waits" wait_for "its first try" has_waited
must "the registry starts again" registry_start
check "then it goes on" wait "$starting"
stop "$registry_pid"
equal "and the registry is needed no more" "" docker exec whole sh -c 'cd /; sha256sum -c /tools/sums >/tmp.out || head /tmp.out'
must "the registry starts again" registry_start
equal "the statistics tell it" $((full_before + 1)) counter starts_full
check "and docker info" sh -c '/usr/bin/docker info 2>/dev/null | grep "Starts of them: .* 1 full"'
equal "and docker inspect" full: sh -c '/usr/bin/docker inspect -f "{{.GraphDriver.Data.LazyStart}}" whole | cut -d " " -f 1'

# --- the end

docker ps -aq | xargs -r /usr/bin/docker rm -f >/dev/null
check "nothing is mounted without containers" wait_for "the last unmount" no_mounts
check "nothing is registered" registered 0
docker_stop
must "Docker starts again" docker_start
equal "a file is read after all that" "$(sum_of sizes/4096)" docker $RUN app-zran sh -c 'cd /; sha256sum ./sizes/4096'
for kind in $KINDS; do
    docker rmi "app-$kind" "$REGISTRY/lazy/$kind:v6-docker" >/dev/null
done
check "all images are removed" layers 0
check "nothing is mounted at the end" no_mounts
docker_stop
stop "$plugin_pid"
check "the daemon ends in order" stop "$daemon_pid"
finish
