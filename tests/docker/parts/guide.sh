#!/usr/bin/env bash
# The Nydus guide in full, through the cachefiles door: Debian's dockerd with its daemon.json, images pulled and run with
# nothing written by hand, changed, committed and pushed, six containers of three images at once; nothing left at the end.
# Started in the guest by tests/guest/docker.sh.
. "$(dirname "${BASH_SOURCE[0]}")/docker.sh"
. "$HERE/lazy.sh"

RUN="run --network host --rm"

must "the registry starts" registry_start
must "the daemon starts" daemon_start
check "through /dev/cachefiles" grep -q 'doors \["cachefiles"\]' "$WORK/daemon.log"
must "the plugin listens" plugin_start
must "Docker starts with the guide's daemon.json" docker_start
for kind in $KINDS; do
    must "$kind is pushed" lazy_push "$kind"
    must "$kind is pulled" docker pull -q "$REGISTRY/lazy/$kind:v6-docker"
    must "$kind is built upon" lazy_build "$kind"
done
check "pulling and building fetches nothing of the blobs" test "$(counter fetched_bytes)" = 0
equal "a file is read" "$(sum_of sizes/4096)" docker $RUN app-zstd-64k sh -c 'cd /; sha256sum ./sizes/4096'
fetched=$(counter fetched_bytes)
size=$(stat -c %s "$FIXTURES"/zstd-64k/????????????????????????????????????????????????????????????????)
echo "fetched $fetched of $size bytes"
check "far fewer bytes were fetched than the image has" test "$fetched" -gt 0 -a "$fetched" -lt $((size / 4))
for kind in $KINDS; do
    equal "every file of $kind is right" "" docker $RUN "app-$kind"
done
check "a container changes the image" docker run --network host --name changed app-lz4-1m sh -c \
    'cd /; rm ./big/text-7m; echo more >>./sizes/4096; mkdir new'
equal "docker diff tells it" "C /big
D /big/text-7m
A /new
C /sizes
C /sizes/4096" docker diff changed
check "it is committed" docker commit changed "$REGISTRY/changed:1"
check "it is pushed" docker push -q "$REGISTRY/changed:1"
docker rm changed >/dev/null
docker rmi "$REGISTRY/changed:1" >/dev/null
check "it is pulled" docker pull -q "$REGISTRY/changed:1"
equal "and is what it was" "$(sum_of big/random-5m)" docker $RUN "$REGISTRY/changed:1" sh -c \
    'cd /; test ! -e big/text-7m; sha256sum ./big/random-5m'
docker rmi "$REGISTRY/changed:1" >/dev/null
number=0
for kind in $KINDS $KINDS; do
    check "container $number of $kind starts" docker run -d --network host --name "six-$number" "app-$kind" sh -c \
        'cd /; sha256sum -c /tools/sums >/out && touch /round; sleep 1000'
    number=$((number + 1))
done
check "each image is mounted once" images_mounted 3
for number in 0 1 2 3 4 5; do
    check "container $number reads everything right" wait_for "its end" docker exec "six-$number" test -e /round
done
plugin_kill
must "the plugin starts again" plugin_start
equal "the containers have their files" "$(sum_of sizes/4096)" docker exec six-2 sh -c 'cd /; sha256sum ./sizes/4096'
docker ps -aq | xargs -r /usr/bin/docker rm -f >/dev/null
check "nothing stays mounted" wait_for "the last unmount" no_mounts
for kind in $KINDS; do
    docker rmi "app-$kind" "$REGISTRY/lazy/$kind:v6-docker" >/dev/null
done
check "all images are removed" layers 0
docker_stop
stop "$plugin_pid"
check "the daemon ends in order" stop "$daemon_pid"
finish
