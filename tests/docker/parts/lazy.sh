# What the suites with lazily loaded images share: the images, and what must come out of them.

# shellcheck shell=bash

FIXTURES=${FIXTURES:-$TOP/tests/fixtures}
KINDS="lz4-1m zstd-64k zran"

counter() {
    curl -s --unix-socket "$SOCKET" http://localhost/api/sluice/v1/stat |
        python3 -c "import json, sys; print(json.load(sys.stdin)['counters']['$1'])"
}

# registered N: so many images are mounted by the daemon.
registered() {
    [ "$(curl -s --unix-socket "$SOCKET" http://localhost/api/sluice/v1/mounts |
        python3 -c 'import json, sys; print(len(json.load(sys.stdin)))')" = "$1" ]
}

images_mounted() {
    [ "$(grep ' - erofs ' /proc/self/mountinfo | grep -c "$HOME_DIR/layers/.*/image ")" = "$1" ]
}

lazy_push() { # KIND
    local -a others=()
    [ "$1" != zran ] || others=("$WORK/source.blob")
    python3 "$HERE/lazy_image.py" "$REGISTRY" "lazy/$1" v6-docker "$FIXTURES/$1" "${others[@]}"
}

# lazy_build KIND: an image on top of a lazily loaded one, with a shell and the digests of all files.
lazy_build() {
    cat >"$WORK/build/Dockerfile" <<TXT
FROM $REGISTRY/lazy/$1:v6-docker
COPY tools /tools
CMD ["sh", "-c", "cd / && sha256sum -c /tools/sums >/tmp.out || head /tmp.out"]
TXT
    docker build -t "app-$1" "$WORK/build"
}

# sum_of PATH: the line of sha256sum it must give.
sum_of() {
    grep "  ./$1\$" "$WORK/sums"
}

python3 - "$FIXTURES/tree.txt" >"$WORK/sums" <<'TXT'
import ast, sys
for line in open(sys.argv[1]):
    end = line.index("' 0o") + 1
    name, fields = ast.literal_eval(line[:end]), line[end:].split()
    if fields[0].startswith('0o100') and '\n' not in name and '\\' not in name:
        print(f'{fields[4]}  ./{name}')
TXT
cp "$FIXTURES/source.tar.gz" "$WORK/source.blob"
mkdir -p "$WORK/build/tools/bin"
cp /bin/busybox "$WORK/build/tools/bin/busybox"
for applet in sh cat ls sha256sum sleep head stat echo rm mkdir touch date wc test find; do
    ln -s busybox "$WORK/build/tools/bin/$applet"
done
cp "$WORK/sums" "$WORK/build/tools/sums"
