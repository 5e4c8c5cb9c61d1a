#!/usr/bin/env bash
# A managed plugin: made by tools/docker-plugin, created and enabled by Docker, with storage driver and daemon in one. Lazily
# loaded and ordinary images run; a restart of Docker finds everything; nothing is left.
. "$(dirname "${BASH_SOURCE[0]}")/parts/docker.sh"
. "$HERE/lazy.sh"

RUN="run --network host --rm"
PLUGIN=sluice/graphdriver:test

must "the plugin's directory is made" "$TOP/tools/docker-plugin" --bin "$SLUICE" "$WORK/plugin"
echo '{ "experimental": true }' >"$WORK/first.json"
echo "{ \"experimental\": true, \"storage-driver\": \"$PLUGIN\" }" >"$WORK/second.json"
must "the registry starts" registry_start
DAEMON_JSON=$WORK/first.json
must "Docker starts" docker_start
must "the plugin is created" docker plugin create "$PLUGIN" "$WORK/plugin"
must "it is told where Docker's data is" docker plugin set "$PLUGIN" docker.source="$WORK/docker" credentials.source="$HOME"
must "it is enabled" docker plugin enable "$PLUGIN"
docker_stop
DAEMON_JSON=$WORK/second.json
must "Docker starts with it as its driver" docker_start
equal "it is the driver" "$PLUGIN" docker info -f '{{.Driver}}'
python3 "$HERE/image.py" "$WORK/image.tar" "$REGISTRY/app:1" || finish
check "an ordinary image is loaded" docker load -i "$WORK/image.tar"
equal "and runs" hello docker $RUN "$REGISTRY/app:1"
must "a lazy image is pushed" lazy_push zstd-64k
must "it is pulled" docker pull -q "$REGISTRY/lazy/zstd-64k:v6-docker"
must "it is built upon" lazy_build zstd-64k
equal "every file of it is right" "" docker $RUN app-zstd-64k
docker_stop
must "Docker starts again" docker_start
equal "every file of it is right again" "" docker $RUN app-zstd-64k
docker rmi app-zstd-64k "$REGISTRY/lazy/zstd-64k:v6-docker" "$REGISTRY/app:1" >/dev/null
HOME_DIR=$(echo "$WORK"/docker/plugins/*/propagated-mount/"$PLUGIN")
check "all images are removed" layers 0
check "nothing is mounted" no_mounts
docker_stop
DAEMON_JSON=$WORK/first.json
must "Docker starts without it" docker_start
check "the plugin is disabled" docker plugin disable "$PLUGIN"
check "and removed" docker plugin rm "$PLUGIN"
check "with all it had" bash -c "! ls -d $WORK/docker/plugins/*/propagated-mount 2>/dev/null"
finish
