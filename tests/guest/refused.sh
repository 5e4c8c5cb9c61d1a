#!/bin/bash
# A kernel that shows zeros for what is not in a backing file has all that the fanotify door asks for by name, and must
# be refused all the same: by the daemon, with the reason, and by the doctor.
# doors: fanotify
# kernel: 6.17
. /guest/suite/parts/harness.sh

# daemon_refuses DOOR: it ends by itself, soon, and says why.
daemon_refuses() {
    timeout "$PATIENCE_S" sluice daemon --door "$1" --cache "$CACHE" --apisock "$SOCKET" --state-dir /cache/state \
        >/tmp/refusal 2>&1
    local status=$?
    cat /tmp/refusal
    [ "$status" = 1 ] && grep -q 'could show zeros' /tmp/refusal
}

doctor_warns() {
    local status
    sluice doctor --cache "$CACHE" >/tmp/doctor 2>&1
    status=$?
    cat /tmp/doctor
    [ "$status" = 1 ] && grep -q 'FAIL.*zeros' /tmp/doctor
}

check "the daemon refuses the fanotify door" daemon_refuses fanotify
cat /tmp/refusal
check "the daemon finds no door" daemon_refuses auto
check "the doctor says so" doctor_warns
check "nothing is mounted" test -z "$(grep -E 'erofs|/cache/sluice' /proc/mounts)"
finish
