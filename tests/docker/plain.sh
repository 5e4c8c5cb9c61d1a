#!/usr/bin/env bash
# Ordinary images on Debian's dockerd with our graphdriver: everything a user does with them, restarts and a killed
# plugin in between, and nothing left at the end. Lazily loaded images are in lazy.sh.
. "$(dirname "${BASH_SOURCE[0]}")/parts/docker.sh"

RUN="run --network host --rm"

# --- pull, run

must "the plugin listens" plugin_start
must "Docker starts with the guide's driver name" docker_start
must "the registry starts" registry_start
equal "Docker uses the driver" "$NAME" docker info -f '{{.Driver}}'
python3 "$HERE/image.py" "$WORK/image.tar" "$REGISTRY/app:1" || finish
must "an image is loaded" docker load -i "$WORK/image.tar"
identity=$(docker images -q --no-trunc "$REGISTRY/app:1")
equal "it runs" hello docker $RUN "$REGISTRY/app:1"
check "it is pushed" docker push -q "$REGISTRY/app:1"
check "its layers go with it" docker rmi "$REGISTRY/app:1"
check "and nothing of them stays" layers 0
must "it is pulled" docker pull -q "$REGISTRY/app:1"
equal "and is the same" "$identity" docker images -q --no-trunc "$REGISTRY/app:1"
equal "upper layers hide and replace what is below" "/etc/conf.d /etc/group /etc/hostname /etc/hosts /etc/mtab \
/etc/passwd /etc/resolv.conf /etc/word /old/three " docker $RUN "$REGISTRY/app:1" sh -c 'echo -n /etc/* /old/* ""'
equal "owners, modes, links and times are right" "-rw-r----- 1 12 34 /etc/word
-rws--x--x 2 0 0 /opt/again
lrwxrwxrwx 1 0 0 /opt/link
-rws--x--x 2 0 0 /opt/suid
1700000000" docker $RUN "$REGISTRY/app:1" sh -c 'stat -c "%A %h %u %g %n" /etc/word /opt/again /opt/link /opt/suid
    stat -c %Y /opt/suid'
equal "docker inspect names the directories" true docker inspect -f \
    '{{.GraphDriver.Data.UpperDir | ne ""}}' "$REGISTRY/app:1"

# --- change, commit, save, load, push, pull, build

changes='cd /; echo new >etc/new; rm etc/word; rm -r old; mkdir old; echo 4 >old/four; echo changed >>etc/passwd
ln -s x opt/l; ln opt/l opt/hard; mkfifo opt/pipe; mknod opt/null c 1 3; chmod 4750 bin/busybox; mkdir -p opt/a/b
dd if=/dev/zero of=opt/sparse bs=1 count=1 seek=10000000; touch -d "2001-02-03 04:05:06" opt/a; chown 70000:80000 opt/a/b'
look='cd /; find . -xdev \( -path ./proc -o -path ./sys -o -path ./dev \) -prune -o -print | sort |
    grep -vE "^./etc/(hosts|hostname|resolv.conf|mtab)$" | xargs stat -c "%n %A %u %g %h %t.%T" | md5sum
    md5sum etc/new etc/passwd opt/sparse old/four; stat -c "%n %Y" opt/a'
check "a container makes changes" docker run --network host --name changed "$REGISTRY/app:1" sh -c "$changes"
equal "docker diff tells them" "C /bin
C /bin/busybox
C /etc
A /etc/new
C /etc/passwd
D /etc/word
C /old
A /old/four
D /old/three
C /opt
A /opt/a
A /opt/a/b
A /opt/hard
A /opt/l
A /opt/null
A /opt/pipe
A /opt/sparse" docker diff changed
check "a container is started again" docker start -a changed
docker run -d --network host --name seen "$REGISTRY/app:1" sh -c "$changes; sleep 600" >/dev/null
wait_for "its changes" docker exec seen test -e /opt/a/b
sleep 0.5
docker exec seen sh -c "$look" >"$WORK/seen"
check "a running container is committed" docker commit seen "$REGISTRY/app:2"
equal "the commit shows what the container showed" "$(cat "$WORK/seen")" docker $RUN "$REGISTRY/app:2" sh -c "$look"
check "docker cp reads a container" docker cp seen:/etc/new "$WORK/new"
equal "and reads it right" new cat "$WORK/new"
check "it is removed while it runs" docker rm -f seen
check "the commit is saved" docker save -o "$WORK/saved.tar" "$REGISTRY/app:2"
check "the commit is pushed" docker push -q "$REGISTRY/app:2"
committed=$(docker images -q --no-trunc "$REGISTRY/app:2")
docker rm changed >/dev/null
check "all are removed" docker rmi "$REGISTRY/app:2" "$REGISTRY/app:1"
check "nothing of them stays" layers 0
check "the saved one is loaded" docker load -i "$WORK/saved.tar"
equal "and is the same" "$(cat "$WORK/seen")" docker $RUN "$REGISTRY/app:2" sh -c "$look"
docker rmi "$REGISTRY/app:2" >/dev/null
check "the pushed one is pulled" docker pull -q "$REGISTRY/app:2"
equal "it has the same identity" "$committed" docker images -q --no-trunc "$REGISTRY/app:2"
equal "and is the same again" "$(cat "$WORK/seen")" docker $RUN "$REGISTRY/app:2" sh -c "$look"
mkdir -p "$WORK/build"
echo "from the context" >"$WORK/build/file"
cat >"$WORK/build/Dockerfile" <<TXT
FROM $REGISTRY/app:2
RUN rm -r /old && echo built >/etc/built
COPY file /opt/file
RUN mkdir /old && cat /opt/file >>/etc/built
CMD ["sh", "-c", "cat /etc/built; ls /old"]
TXT
check "an image is built" docker build --network host -t built "$WORK/build"
equal "and runs" "built
from the context" docker $RUN built
check "it is exported" bash -c "/usr/bin/docker create --name out built && /usr/bin/docker export -o '$WORK/flat.tar' out"
equal "whole" 1 bash -c "tar -tf '$WORK/flat.tar' | grep -c '^opt/file$'"
check "and imported" docker import "$WORK/flat.tar" flat
equal "and runs again" built docker $RUN flat head -n 1 /etc/built
docker rm out >/dev/null
docker rmi flat built >/dev/null
refuse "a size limit is refused by name" "storage-opt size" docker create --storage-opt size=1G "$REGISTRY/app:2"

# --- restarts

docker run -d --network host --name goes-on "$REGISTRY/app:2" sh -c 'while :; do date >/etc/now; sleep 0.2; done' >/dev/null
# Docker asks the plugin before it lets anybody look inside, so look from outside.
seen=/proc/$(docker inspect -f '{{.State.Pid}}' goes-on)/root/etc/now
wait_for "its first file" test -e "$seen"
plugin_kill
touch -r "$seen" "$WORK/before"
check "the container goes on without the plugin" wait_for "a newer file" test "$seen" -nt "$WORK/before"
must "the plugin starts again" plugin_start
refuse "a second one is refused" "another plugin" $(command_of sluice-docker.service)
equal "a new container starts" hello docker $RUN "$REGISTRY/app:2" echo hello
equal "the old one has its files" new docker exec goes-on cat /etc/new
check "it is stopped" docker stop -t 1 goes-on
check "nothing is mounted then" no_mounts
check "it is started" docker start goes-on
docker_stop
check "Docker's stop unmounts everything" no_mounts
must "Docker starts again" docker_start
equal "the container is there" exited docker inspect -f '{{.State.Status}}' goes-on
check "and starts" docker start goes-on
stop "$docker_pid" KILL
rm -f /run/docker.pid
plugin_kill
must "both start after both were killed" plugin_start
must "Docker, too" docker_start
check "what was found is served" docker start goes-on
equal "with its files" new docker exec goes-on cat /etc/new
check "a killed Docker leaves nothing behind" docker rm -f goes-on

# --- the end

docker images -q | sort -u | xargs -r /usr/bin/docker rmi -f >/dev/null
check "all images are removed" layers 0
check "nothing is mounted" no_mounts
docker_stop
check "the plugin outlives Docker" kill -0 "$plugin_pid"
stop "$plugin_pid"
check "and takes its socket along" test ! -e "/run/docker/plugins/$NAME.sock"
finish
