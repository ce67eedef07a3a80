# What people do with disks, round after round. Runs behind lib.sh, tools.sh and kernel.sh.
# PARTS: directories of the source tree in $DISK_source; none means all. SOAK_SECONDS: begin no round after that.
# TREE, FIO: not empty for that part of a round. BUILD: what to make of the tree in $DISK_build, with the programs of
# $DISK_tools, which is held against what reference.sh has left in $DISK_reference.
base=$SCRATCH/base.qcow2
overlay=$SCRATCH/overlay.qcow2
workload=$SCRATCH/fio.qcow2
mnt=$SCRATCH/mnt
# A round may leave so much more in the image than the first one did: logs of the file system move about.
SLACK_MIB=96
JOBS=16
JOB_MIB=4
KILLS=3
mkdir -p "$mnt"

# members TOP: what to take out of the archive
members() {
    local part
    [ -n "$PARTS" ] || { printf '%s\n' "$1"; return; }
    for part in $PARTS; do printf '%s/%s\n' "$1" "$part"; done
}

# unpack DIR
unpack() {
    # shellcheck disable=SC2046 # one word per member
    tar -xf "$DISK_source" -C "$1" $(members "$top")
}

# allocated FILE: in MiB
allocated() { du -m "$1" | cut -f1; }

drop_caches() { sync && echo 3 >/proc/sys/vm/drop_caches; }

server() { ublk-qcow2 list --json | tr -d ' \n' | grep -o "{[^}]*\"id\":${DEVICE#/dev/ublkb}[,}][^}]*}*" | grep -o '"pid":[0-9]*' | cut -d: -f2; }

prepare() {
    top=$(tar -tf "$DISK_source" 2>/dev/null | head -n 1 | cut -d/ -f1)
    [ -n "$top" ] || fail "the archive of the source tree is empty"
    mkdir -p "$SCRATCH/plain"
    must "unpacked the tree on a plain file system" unpack "$SCRATCH/plain"
    sums "$SCRATCH/plain" >"$SCRATCH/sums" || fail "cannot sum the tree"
    say "$(wc -l <"$SCRATCH/sums") files, $(du -sm "$SCRATCH/plain" | cut -f1) MiB"
    rm -rf "$SCRATCH/plain"
    [ -z "$BUILD" ] || must "fetched the sums of a build" tar -xf "$DISK_reference" -C "$SCRATCH" reference
    must "made the backing image" qemu-img create -q -f qcow2 "$base" 8G
    attach "$base"
    must "mkfs.xfs" mkfs.xfs -q -f "$DEVICE"
    must "mounted" mount -t xfs "$DEVICE" "$mnt"
    mkdir "$mnt/below"
    must "a tree in the backing image" unpack "$mnt/below"
    must "unmounted" umount "$mnt"
    detach
    sha256sum "$base" >"$SCRATCH/base.sum"
    must "made an overlay" qemu-img create -q -f qcow2 -b "$base" -F qcow2 "$overlay"
    must "made an image for fio" qemu-img create -q -f qcow2 "$workload" $((JOBS * JOB_MIB * 2))M
}

# same_as DIR SUMS WHAT
same_as() {
    drop_caches
    sums "$1" >"$SCRATCH/sums-found"
    cmp -s "$SCRATCH/sums-found" "$2" && return 0
    diff "$SCRATCH/sums-found" "$2" | head -n 10 | sed 's/^/       | /'
    fail "$3 is not the same as on a plain file system"
}

# tree_round N: unpacked, read back, removed, trimmed, on an overlay that may not grow
tree_round() {
    local size
    attach -q 2 "$overlay"
    must "mounted the overlay" mount -t xfs "$DEVICE" "$mnt"
    mkdir "$mnt/above"
    must "unpacked the tree" unpack "$mnt/above"
    same_as "$mnt/above" "$SCRATCH/sums" "the tree on the device"
    same_as "$mnt/below" "$SCRATCH/sums" "the tree in the backing image"
    must "removed it" rm -rf "$mnt/above"
    [ -z "$BUILD" ] || build_round
    sync
    must "trimmed" fstrim "$mnt"
    must "unmounted" umount "$mnt"
    must "xfs_repair -n finds nothing" xfs_repair -n "$DEVICE"
    detach
    must "qemu-img check finds nothing" qemu-img check -q -f qcow2 "$overlay"
    size=$(allocated "$overlay")
    [ "$1" -gt 1 ] || first=$size
    say "the overlay takes $size MiB; after the first round it took $first"
    [ "$size" -le $((first + SLACK_MIB)) ] || fail "the image grows: $size MiB, after the first round $first"
    sha256sum -c "$SCRATCH/base.sum" >/dev/null 2>&1 || fail "the backing image has changed"
}

# build_round: every file as the build on a plain file system has left it, removed again
build_round() {
    local before
    before=$(date +%s)
    mkdir "$mnt/built"
    must "unpacked what a build needs" tar -xf "$DISK_build" -C "$mnt/built"
    tools_at "$mnt/built"
    must "fetched what the compiler has made before" tar -xf "$DISK_reference" -C "$AROUND" ccache
    kernel_build
    say "how often the compiler's results were reused:" && kernel_reuse | sed 's/^/       | /'
    tools_gone
    same_as "$mnt/built" "$SCRATCH/reference" "what was built on the device"
    ok "$(wc -l <"$SCRATCH/reference") files of a build are as on a plain file system, after $(($(date +%s) - before)) s"
    must "removed them" rm -rf "$mnt/built"
}

# load: each job writes a region of its own and verifies it, and another trims its neighbour
load() {
    fio --filename="$DEVICE" --ioengine=libaio --direct=1 --thread --iodepth=4 --numjobs=$JOBS --size=${JOB_MIB}M \
        --offset_increment=$((JOB_MIB * 2))M --randseed="$SEED$round" --group_reporting \
        --name=write --rw=randwrite --bssplit=512/10:4k/40:64k/40:256k/10 --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --name=trim --rw=randtrim --bs=64k --offset=${JOB_MIB}M
}

# load_until_killed: again and again, until the server has been killed often enough
load_until_killed() {
    while :; do
        load >"$SCRATCH/fio.out" 2>&1 || return 1
        [ -e "$SCRATCH/killed" ] && return 0
    done
}

# fio_round: written and verified while the server is killed, and the same after it was attached anew
fio_round() {
    local writer pid kills=0 before after
    attach -q 2 "$workload"
    rm -f "$SCRATCH/killed"
    load_until_killed &
    writer=$!
    while [ $kills -lt $KILLS ] && sleep 2 && kill -0 $writer 2>/dev/null; do
        pid=$(server)
        [ -n "$pid" ] && kill -KILL "$pid" && kills=$((kills + 1))
    done
    touch "$SCRATCH/killed"
    wait $writer || {
        tail -n 20 "$SCRATCH/fio.out"
        fail "fio, across $kills kills of the server"
    }
    [ $kills = $KILLS ] || fail "the server was killed $kills times, not $KILLS"
    ok "fio verified what $JOBS jobs wrote, across $kills kills of the server"
    before=$(sha256sum <"$DEVICE") || fail "cannot read $DEVICE"
    detach
    must "qemu-img check finds nothing worse than leaks" only_leaks "$workload"
    attach -q 1 "$workload"
    after=$(sha256sum <"$DEVICE") || fail "cannot read $DEVICE"
    [ "$before" = "$after" ] || fail "the device shows something else after it was attached anew"
    detach
}

start=$(date +%s)
say "Linux $(uname -r), $(qemu-img --version | head -n 1)"
prepare
round=0
while [ $(($(date +%s) - start)) -lt "$SOAK_SECONDS" ] || [ $round = 0 ]; do
    round=$((round + 1))
    [ -z "$TREE" ] || tree_round $round
    [ -z "$FIO" ] || fio_round
    ok "round $round: ${TREE:+tree }${FIO:+fio }$(($(date +%s) - start)) s since the start"
done
echo "soak ended after $round rounds, $step_count steps, all of them seen to hold"
