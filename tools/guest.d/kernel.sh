# The guest's kernel. For the cachefiles door a prebuilt one beside the checkout, or one built once from Debian's kernel
# source: no distribution packages that door. For the fanotify door, or by version, a packaged one (packaged.sh).
# Sourced by tools/guest. Gives: kernel_image WISH, which sets `kernel` to the path of a bootable image in the cache,
# and `initrd` and `modules`, both empty for a kernel with everything in it.

# shellcheck shell=bash

KERNEL_CONFIG="$GUEST_PARTS/kernel.config"
KERNEL_SERIES=6.12
# The packaged series that the fanotify door is tested on unless a run names another.
KERNEL_FANOTIFY=7.3
# Compilations that this configuration needs, for the progress line only.
KERNEL_OBJECTS=1550

# WISH is a door, a version, "build" (although a prebuilt kernel is there), or the path of a kernel.
kernel_image() {
    local wish=$1 key prebuilt="$GUEST_TOP/../shared/kernel/bzImage-$KERNEL_SERIES"
    initrd="" modules=""
    case "$wish" in
        cachefiles | build) ;;
        fanotify) packaged_kernel "$KERNEL_FANOTIFY"; return ;;
        */*)
            [ -f "$wish" ] || fail "there is no kernel $wish"
            kernel=$wish
            return
            ;;
        [0-9]*) packaged_kernel "$wish"; return ;;
        *) fail "$wish is no kernel: name a version like 6.18, a path, or build" ;;
    esac
    key=$(sha256sum <"$KERNEL_CONFIG" | cut -c 1-12)
    kernel="$GUEST_CACHE/bzImage-$key"
    if [ ! -f "$kernel" ] && [ "$wish" != build ] && [ -f "$prebuilt" ]; then
        kernel="$GUEST_CACHE/bzImage-prebuilt"
        [ -f "$kernel" ] && [ ! "$prebuilt" -nt "$kernel" ] || install -m 644 "$prebuilt" "$kernel"
    fi
    [ -f "$kernel" ] || kernel_build "$kernel"
}

# The series we test on, or else the newest that still has EROFS over fscache (5.19 up to, not including, 7.2).
kernel_source_package() {
    local found
    found=$(apt-cache pkgnames linux-source- | grep -xE 'linux-source-[0-9]+\.[0-9]+' | sort -V)
    if grep -qx "linux-source-$KERNEL_SERIES" <<<"$found"; then
        echo "linux-source-$KERNEL_SERIES"
        return
    fi
    found=$({ echo "$found"; echo linux-source-5.18.9; echo linux-source-7.2; } | sort -V |
        sed -n '/^linux-source-5\.18\.9$/,/^linux-source-7\.2$/p' |
        grep -vxE 'linux-source-(5\.18\.9|7\.2)' | tail -n 1)
    [ -n "$found" ] || return 1
    note "this Debian has no linux-source-$KERNEL_SERIES; taking $found"
    echo "$found"
}

kernel_build() {
    local image=$1 work="$GUEST_CACHE/kernel-build" package log tree
    "$GUEST_TOOLS/install" kernel
    package=$(kernel_source_package) || {
        "$GUEST_TOOLS/install" index
        package=$(kernel_source_package) ||
            fail "no linux-source package between 5.19 and 7.1 in this Debian's index (bookworm has it in" \
                "bookworm-security); or point GUEST_KERNEL at a kernel built with $KERNEL_CONFIG"
    }
    note "building the kernel from $package (once; about 12 minutes on two cores)"
    rm -rf "$work"
    mkdir -p "$work"
    log="$work/log"
    (cd "$work" && apt-get -q download -o APT::Sandbox::User= "$package" >"$log" 2>&1) ||
        fail "cannot download $package: $(tail -n 1 "$log")"
    dpkg-deb --fsys-tarfile "$work/$package"_*.deb | tar -C "$work" --strip-components=3 -xf - ./usr/src
    rm "$work/$package"_*.deb
    note "unpacking $(du -h "$work/$package.tar.xz" | cut -f 1) of source"
    tar -C "$work" -xf "$work/$package.tar.xz"
    rm "$work/$package.tar.xz"
    tree="$work/$package"
    make -C "$tree" KCONFIG_ALLCONFIG="$KERNEL_CONFIG" allnoconfig >>"$log" 2>&1 ||
        fail "the kernel's configuration failed; the log is $log"
    kernel_config_kept "$tree/.config"
    if ! kernel_make "$tree" "$log"; then
        tail -n 15 "$log" >&2
        fail "the kernel did not build; the log is $log"
    fi
    mv "$tree/arch/x86/boot/bzImage" "$image"
    rm -rf "$work"
}

# An option that the source dropped for want of a dependency would otherwise show much later, as a failing mount.
kernel_config_kept() {
    local option
    for option in CACHEFILES_ONDEMAND EROFS_FS_ONDEMAND EXT4_FS IO_URING VIRTIO_BLK VIRTIO_CONSOLE; do
        grep -qx "CONFIG_$option=y" "$1" || fail "the kernel source does not take CONFIG_$option=y"
    done
}

kernel_make() {
    local tree=$1 log=$2 started=$SECONDS objects=0 builder status=0
    setpriv --pdeathsig TERM nice make -C "$tree" -j"$(nproc)" bzImage </dev/null >>"$log" 2>&1 &
    builder=$!
    GUEST_CHILDREN+=("$builder")
    while kill -0 "$builder" 2>/dev/null; do
        sleep 5
        objects=$(grep -cE '^  (CC|AS) ' "$log" || true)
        progress "kernel: $objects of about $KERNEL_OBJECTS compiled, $((SECONDS - started)) s"
    done
    wait "$builder" || status=$?
    progress_end
    return "$status"
}
