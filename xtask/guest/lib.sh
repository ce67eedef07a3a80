# Shared by the scripts that tell a story in steps. Sourced as text: xtask puts it in front of each of them.
set -u
step_count=0
DEVICE=

# say TEXT: one line of narration
say() { printf '       %s\n' "$*"; }

# ok TEXT: a step that has been seen to hold
ok() {
    step_count=$((step_count + 1))
    printf '[ ok ] %s\n' "$*"
}

# fail TEXT: the end of the story
fail() {
    printf '[FAIL] %s\n' "$*"
    exit 1
}

# must TEXT COMMAND…: runs COMMAND quietly; its output is shown only when it fails
must() {
    local what=$1 output
    shift
    if output=$("$@" 2>&1); then
        ok "$what"
    else
        [ -n "$output" ] && printf '%s\n' "$output" | sed 's/^/       | /'
        fail "$what: \`$*\` failed"
    fi
}

# attach ARGUMENTS…: ublk-qcow2 add; leaves the device's path in DEVICE
attach() {
    local output
    output=$(timeout 60 ublk-qcow2 add "$@" 2>"$SCRATCH/add.err") || {
        sed 's/^/       | /' "$SCRATCH/add.err"
        fail "ublk-qcow2 add $* failed"
    }
    DEVICE=$(printf '%s\n' "$output" | grep -o '/dev/ublkb[0-9]*' | head -n 1)
    [ -n "$DEVICE" ] || fail "ublk-qcow2 add printed no device, but: $output"
    [ -b "$DEVICE" ] || fail "$DEVICE is not a block device"
}

# detach: ublk-qcow2 del of DEVICE
detach() {
    local id=${DEVICE#/dev/ublkb} output
    output=$(timeout 60 ublk-qcow2 del -n "$id" 2>&1) || {
        printf '%s\n' "$output" | sed 's/^/       | /'
        fail "ublk-qcow2 del -n $id failed"
    }
    [ -e "$DEVICE" ] && fail "$DEVICE is still there after ublk-qcow2 del"
    DEVICE=
}

# only_leaks IMAGE: whether `qemu-img check` finds nothing worse in it
only_leaks() {
    qemu-img check -q -f qcow2 "$1"
    case $? in 0 | 3) return 0 ;; *) return 1 ;; esac
}

# the_end: the last line of a story that went well
the_end() { echo "demo passed: $step_count steps, all of them seen to hold"; }

# Leaves nothing behind on a host, however the story ends.
cleanup() {
    local mounted
    for mounted in "$SCRATCH"/mnt-tools/* "$SCRATCH"/mnt*; do
        umount "$mounted" 2>/dev/null
    done
    [ -n "$DEVICE" ] && timeout 60 ublk-qcow2 del -n "${DEVICE#/dev/ublkb}" >/dev/null 2>&1
}
trap cleanup EXIT
