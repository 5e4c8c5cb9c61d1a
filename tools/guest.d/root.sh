# The guest's base root disk: Debian packages unpacked, not installed (no maintainer script runs, no root needed).
# Sourced by tools/guest. Gives: root_disk, which sets `root` to the path of the cached image, after building it if need be.
# The image is never written after it was built; each run puts its own throw-away layer over it.

# shellcheck shell=bash

ROOT_PACKAGES="$GUEST_PARTS/packages"

root_disk() {
    local key
    key=$({ cat "$ROOT_PACKAGES" "$GUEST_PARTS/root.sh"; grep -h VERSION_ID /etc/os-release || true; } |
        sha256sum | cut -c 1-12)
    root="$GUEST_CACHE/root-$key.img"
    if [ ! -f "$root" ]; then
        note "building the root disk (once; Debian packages are unpacked into it)"
        rm -f "$GUEST_CACHE"/root-*.img
        root_build "$root"
    fi
}

root_build() {
    local image=$1 work="$GUEST_CACHE/root-build"
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "the guest's root disk is made of Debian packages, and this machine has no apt-get and dpkg-deb"
    rm -rf "$work"
    mkdir -p "$work"
    root_download "$work" >&2
    root_unpack "$work"
    root_configure "$work/root"
    # Twice what is in it, and room to write; the file is sparse.
    local size_mb
    size_mb=$(($(du -sm "$work/root" | cut -f 1) * 2 + 256))
    truncate -s "${size_mb}M" "$work/root.img"
    mke2fs -q -F -t ext4 -m 0 -E root_owner=0:0 -d "$work/root" "$work/root.img"
    mv "$work/root.img" "$image"
    rm -rf "$work"
}

# Resolves the packages against an empty system, so that what is installed here changes nothing.
root_download() {
    local work=$1 attempt
    local -a packages
    mapfile -t packages < <(grep -v '^#' "$ROOT_PACKAGES")
    mkdir -p "$GUEST_CACHE/debs/partial"
    : >"$work/status"
    for attempt in first second; do
        if apt-get -q install --download-only -y --no-install-recommends \
            -o Dir::State::Status="$work/status" -o Dir::Cache::Archives="$GUEST_CACHE/debs" \
            -o Debug::NoLocking=1 -o APT::Sandbox::User= \
            -o APT::Get::AllowUnauthenticated=false -o Dpkg::Use-Pty=0 "${packages[@]}" >"$work/apt.log" 2>&1; then
            grep -hE '^(Need to get|After this)' "$work/apt.log" || true
            # What was resolved now, and not what earlier resolutions left in the cache.
            apt-get -q install --print-uris -y --no-install-recommends \
                -o Dir::State::Status="$work/status" -o Dir::Cache::Archives="$work/none" \
                -o Debug::NoLocking=1 "${packages[@]}" |
                sed -n "s/^'[^']*' \([^ ]*\.deb\) .*/\1/p" >"$work/debs"
            [ -s "$work/debs" ] && return 0
        fi
        # No index on this machine yet, or one that names packages which are gone from the mirror.
        [ "$attempt" = second ] || "$GUEST_TOOLS/install" index
    done
    cat "$work/apt.log" >&2
    fail "cannot get the Debian packages of the root disk (the end of apt's answer stands above)"
}

root_unpack() {
    local work=$1 tree=$1/root deb
    mkdir -p "$tree/usr/bin" "$tree/usr/sbin" "$tree/usr/lib" "$tree/usr/lib64"
    for deb in bin sbin lib lib64; do
        ln -s "usr/$deb" "$tree/$deb"
    done
    while read -r deb; do
        dpkg-deb --fsys-tarfile "$GUEST_CACHE/debs/$deb" |
            tar -C "$tree" --keep-directory-symlink --exclude='./usr/share/doc' --exclude='./usr/share/man' \
                --exclude='./usr/share/locale' --exclude='./usr/share/info' --exclude='./dev/*' -xf -
    done <"$work/debs"
}

root_configure() {
    local tree=$1
    mkdir -p "$tree"/{proc,sys,dev,run,tmp,mnt,root,payload,cache,var/tmp,usr/lib/modules}
    printf 'root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$tree/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$tree/etc/group"
    printf '127.0.0.1 localhost guest\n::1 localhost\n' >"$tree/etc/hosts"
    printf 'passwd: files\ngroup: files\nhosts: files\n' >"$tree/etc/nsswitch.conf"
    ln -sf gawk "$tree/usr/bin/awk"
    ln -sf /proc/self/mounts "$tree/etc/mtab"
    # Stage one only: the real init comes with each run, so changing it does not rebuild this disk.
    cat >"$tree/usr/sbin/stage1" <<'TXT'
#!/bin/busybox sh
/bin/busybox mount -t ext4 -o ro /dev/vdb /payload
exec /payload/guest/init
TXT
    chmod 755 "$tree/usr/sbin/stage1"
}
