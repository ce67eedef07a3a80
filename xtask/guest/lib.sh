# Shared by the scripts that tell a story in steps. Sourced as text: xtask puts it in front of each of them.
set -u
step_count=0
DEVICE=
# What stories build on devices of ours, the last one first: maps of the device mapper, and a loop device.
maps=
loop=
own_run_dir=

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

# apart: on a host, gives the story's devices a run directory of their own; the user's are then in no list of ours, and no
# `del --all` takes them
apart() {
    [ -z "${IN_MACHINE:-}$own_run_dir" ] || return 0
    own_run_dir=$(mktemp -d /run/ublk-qcow2-story-XXXXXX) || fail "no run directory"
    export UBLK_QCOW2_RUN_DIR=$own_run_dir
}

# attach ARGUMENTS…: ublk-qcow2 add; leaves the device's path in DEVICE
attach() {
    local output
    apart
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

# undo: whatever there is. What is below something else is busy at first.
undo() {
    local force what
    # Who works beside the story ends.
    : >"$SCRATCH/over"
    for what in $(jobs -p); do kill "$what"; done
    for force in "" --force; do
        for what in "$SCRATCH"/mnt-tools/* "$SCRATCH"/mnt*; do umount "$what"; done
        for what in $maps; do dmsetup remove --retry "$what"; done
        [ -z "$loop" ] || { losetup -d "$loop" && loop=; }
        # Without one nothing was attached, and `del --all` would be for the user's.
        [ -n "${IN_MACHINE:-}$own_run_dir" ] || return
        timeout 60 ublk-qcow2 del --all $force
        # A machine ends with all that it has.
        [ -z "${IN_MACHINE:-}" ] || return
    done
}

# Leaves nothing behind on a host, however the story ends.
cleanup() {
    undo >/dev/null 2>&1
    [ -n "$own_run_dir" ] || return
    set -- "$own_run_dir"/*.json
    if [ -e "$1" ]; then
        say "devices are left; with UBLK_QCOW2_RUN_DIR=$own_run_dir \`ublk-qcow2 del --all --force\` removes them"
    else
        rm -r "$own_run_dir"
    fi
}
trap cleanup EXIT
# The end by a signal is none of itself: that of the time limit, or of whoever listened.
trap 'exit 1' HUP INT PIPE TERM
