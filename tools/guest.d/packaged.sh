# A kernel as Debian packages it, for the doors that need nothing built: bzImage, a small initrd, a disk of modules.
# Sourced by tools/guest. Gives: packaged_kernel PREFIX, which sets `kernel`, `initrd` and `modules`.
# The packages come from trixie-backports, which keeps the newest kernels, through an apt directory of our own: the
# machine's sources, lists and installed packages are neither used nor changed.

# shellcheck shell=bash

PACKAGED_SUITE=trixie-backports
PACKAGED_MIRROR=${GUEST_MIRROR:-http://deb.debian.org/debian}
PACKAGED_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# The flavour without drivers for hardware; ext4 and the consoles are built in, the rest are modules.
PACKAGED_FLAVOUR=cloud-amd64

# packaged_kernel PREFIX: the newest packaged kernel whose version is PREFIX or begins with "PREFIX.".
packaged_kernel() {
    local prefix=$1 key place
    key=$(sha256sum <"$GUEST_PARTS/packaged.sh" | cut -c 1-12)
    place="$GUEST_CACHE/kernel-$prefix-$key"
    if [ ! -d "$place" ]; then
        rm -rf "$GUEST_CACHE/kernel-$prefix"-*
        packaged_build "$prefix" "$place"
    fi
    kernel="$place/vmlinuz" initrd="$place/initrd" modules="$place/modules.img"
}

# Debian's apt on a directory of ours.
packaged_apt() {
    local command=$1 state="$GUEST_CACHE/apt"
    shift
    "$command" -o Dir::Etc::sourcelist="$state/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state/cache" \
        -o APT::Sandbox::User= -o Acquire::Languages=none -o Debug::NoLocking=1 "$@"
}

packaged_index() {
    local state="$GUEST_CACHE/apt"
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        fail "the packaged kernels are Debian's, and this machine has no apt-get and dpkg-deb"
    [ -f "$PACKAGED_KEYRING" ] || fail "$PACKAGED_KEYRING is missing; install debian-archive-keyring"
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    echo "deb [signed-by=$PACKAGED_KEYRING] $PACKAGED_MIRROR $PACKAGED_SUITE main" >"$state/sources.list"
    # A mirror that is down is only a warning for apt, unless it is told.
    packaged_apt apt-get -q update --error-on=any >"$state/log" 2>&1 ||
        fail "cannot read the package index of $PACKAGED_MIRROR ($PACKAGED_SUITE):" \
            "$(grep -m 1 '^[EW]:' "$state/log" || tail -n 1 "$state/log")"
}

# Every version there is, newest first, as "7.3.4+deb13".
packaged_versions() {
    packaged_apt apt-cache pkgnames linux-image- |
        sed -nE "s/^linux-image-([0-9.]+\+deb[0-9]+)-$PACKAGED_FLAVOUR\$/\1/p" | sort -rV
}

# The packages that make up a version; nothing when the archive has dropped some of them. Newer kernels come in three.
packaged_parts() { # VERSION
    local names part
    names="linux-base-$1-$PACKAGED_FLAVOUR linux-binary-$1-$PACKAGED_FLAVOUR linux-modules-$1-$PACKAGED_FLAVOUR"
    if [[ "$(packaged_apt apt-cache show "linux-image-$1-$PACKAGED_FLAVOUR" 2>/dev/null)" != *linux-binary-* ]]; then
        names="linux-image-$1-$PACKAGED_FLAVOUR"
    fi
    for part in $names; do
        packaged_apt apt-cache show "$part" >/dev/null 2>&1 || return 0
    done
    echo "$names"
}

packaged_build() {
    local prefix=$1 place=$2 work="$GUEST_CACHE/kernel-unpack" version chosen="" parts="" release tree
    packaged_index
    for version in $(packaged_versions); do
        [[ "${version%%+*}." = "$prefix".* ]] || continue
        parts=$(packaged_parts "$version")
        chosen=$version
        [ -z "$parts" ] || break
    done
    [ -n "$parts" ] || fail "$PACKAGED_SUITE has no complete package of a kernel $prefix; it names" \
        "$(packaged_versions | sed 's/+.*//' | tr '\n' ' ')"
    note "unpacking Debian's kernel $chosen (once)"
    rm -rf "$work"
    mkdir -p "$work/debs" "$work/tree" "$work/done"
    # shellcheck disable=SC2086
    (cd "$work/debs" && packaged_apt apt-get -q download $parts >../log 2>&1) ||
        fail "cannot download $parts: $(tail -n 1 "$work/log")"
    for version in "$work/debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$version" | tar -C "$work/tree" --exclude='./usr/share' -xf -
    done
    # A merged /usr, as in the guest.
    [ ! -d "$work/tree/lib" ] || cp -r "$work/tree/lib" "$work/tree/usr/"
    tree="$work/tree/usr/lib/modules"
    release=$(ls "$tree")
    mv "$work/tree/boot/vmlinuz-$release" "$work/done/vmlinuz" 2>/dev/null ||
        mv "$tree/$release/vmlinuz" "$work/done/vmlinuz" || fail "the packages of $chosen hold no kernel"
    depmod -b "$work/tree/usr" "$release"
    packaged_initrd "$tree/$release" "$work/done/initrd"
    packaged_disk "$tree" "$work/done/modules.img"
    mv "$work/done" "$place"
    rm -rf "$work"
}

packaged_disk() { # TREE IMAGE
    truncate -s "$(($(du -sm "$1" | cut -f 1) * 5 / 4 + 16))M" "$2"
    mke2fs -q -F -t ext4 -O ^has_journal -m 0 -E root_owner=0:0 -d "$1" "$2"
}

# Only what it takes to reach the root disk. The module is taken out of its compression here.
packaged_initrd() { # MODULES IMAGE
    local tree=${2%/*}/initrd.d driver
    driver=$(find "$1" -name 'virtio_blk.ko*')
    [ -n "$driver" ] || fail "the kernel's packages hold no virtio_blk"
    mkdir -p "$tree"/{bin,dev,proc,root}
    debugfs -R "dump -p /usr/bin/busybox $tree/bin/busybox" "$root" 2>/dev/null
    [ -x "$tree/bin/busybox" ] || fail "there is no busybox on $root; remove $GUEST_CACHE and try again"
    case "$driver" in
        *.xz) xz -dc "$driver" >"$tree/virtio_blk.ko" ;;
        *.zst) zstd -qdc "$driver" >"$tree/virtio_blk.ko" ;;
        *) cp "$driver" "$tree/virtio_blk.ko" ;;
    esac
    cat >"$tree/init" <<'TXT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
$b insmod /virtio_blk.ko
$b mount -t ext4 /dev/vda /root
$b mount -t ext4 -o ro /dev/vdd /root/usr/lib/modules
$b mount -o move /dev /root/dev
exec $b switch_root /root /usr/sbin/stage1
TXT
    chmod 755 "$tree/init"
    (cd "$tree" && find . | cpio --quiet -o -H newc -R 0:0) >"$2"
    rm -rf "$tree"
}
