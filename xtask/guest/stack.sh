# Devices on top of ours, a file system on top of them, and fsx on that, while the servers are killed. And swap space
# (swap.sh), when it is asked for. Runs behind lib.sh and swap.sh.
# SOAK_SECONDS: begin no round after that. SEED: of fsx, and of what goes together. OPERATIONS: of each fsx in a round.
# A round takes each kind of stack once; which file system and cluster size go with it turns from round to round.
kinds="plain partition thin crypt snapshot loop nested"
mnt=$SCRATCH/mnt
JOBS=3
# A server that is killed while it takes over says nothing new: the device suite does that.
LIFETIME=2
mkdir -p "$mnt"

cat >"$SCRATCH/fsx.toml" <<END
flen = 3000000
[opsize]
max = 200000
[weights]
close_open = 1
invalidate = 1
mapread = 5
mapwrite = 10
read = 10
write = 20
truncate = 5
fsync = 2
fdatasync = 2
posix_fallocate = 3
punch_hole = 6
sendfile = 2
posix_fadvise = 1
copy_file_range = 3
END

# below N SIZE: a device of ours, in DEVICE, and first in devices
below() {
    must "made image $1, cluster $cluster" qemu-img create -q -f qcow2 -o "cluster_size=$cluster" "$SCRATCH/stack-$1.qcow2" "$2"
    attach -q 2 "$SCRATCH/stack-$1.qcow2"
    devices="$DEVICE $devices"
}

sectors() { blockdev --getsz "$1"; }

# mapped NAME TABLE: a device of the device mapper, in TOP, and first in maps
mapped() {
    must "dmsetup create $1" dmsetup create "$1" --table "$2"
    TOP=/dev/mapper/$1
    maps="$1 $maps"
}

# The kinds: each leaves in TOP what the file system goes on.
make_plain() {
    below 1 700M
    TOP=$DEVICE
}

make_partition() {
    below 1 700M
    must "made a partition" sh -c "echo ,,L | sfdisk -q $DEVICE"
    TOP=${DEVICE}p1
    for _ in 1 2 3 4 5 6 7 8 9 10; do [ -b "$TOP" ] || sleep 1; done
    [ -b "$TOP" ] || fail "no partition $TOP"
}

make_thin() {
    local size
    below 1 700M
    size=$(($(sectors "$DEVICE") - 16384))
    mapped stack-meta "0 16384 linear $DEVICE 0"
    mapped stack-data "0 $size linear $DEVICE 16384"
    # A pool that is full of zeros has never been used.
    must "no metadata" dd if=/dev/zero of=/dev/mapper/stack-meta bs=4096 count=1 conv=fsync
    mapped stack-pool "0 $size thin-pool /dev/mapper/stack-meta /dev/mapper/stack-data 128 0"
    must "a thin volume" dmsetup message stack-pool 0 "create_thin 0"
    mapped stack-thin "0 1400000 thin /dev/mapper/stack-pool 0"
}

make_crypt() {
    below 1 700M
    mapped stack-crypt "0 $(sectors "$DEVICE") crypt aes-xts-plain64 $(printf '%064d' 7) 0 $DEVICE 0 1 allow_discards"
}

make_snapshot() {
    local origin
    below 1 400M
    origin=$DEVICE
    below 2 600M
    mapped stack-snapshot "0 $(sectors "$origin") snapshot $origin $DEVICE P 16"
}

make_loop() {
    below 1 700M
    TOP=$(losetup --find --show --direct-io=on "$DEVICE") || fail "losetup failed"
    loop=$TOP
}

make_nested() {
    below 1 1200M
    must "mkfs.ext4 below" mkfs.ext4 -q -F "$DEVICE"
    mkdir -p "$SCRATCH/mnt-below"
    must "mounted below" mount "$DEVICE" "$SCRATCH/mnt-below"
    must "made an image on it" qemu-img create -q -f qcow2 -o "cluster_size=$cluster" "$SCRATCH/mnt-below/inner.qcow2" 700M
    attach "$SCRATCH/mnt-below/inner.qcow2"
    devices="$DEVICE $devices"
    TOP=$DEVICE
}

# unmake: everything, from the top down
unmake() {
    local map device
    # A map may be looked at by udev for a moment.
    for map in $maps; do must "dmsetup remove $map" dmsetup remove --retry "$map"; done
    maps=
    [ -z "$loop" ] || must "losetup -d" losetup -d "$loop"
    # From now on it may be somebody else's.
    loop=
    for device in $devices; do
        DEVICE=$device
        detach
        # The inner one goes first.
        if grep -q " $SCRATCH/mnt-below " /proc/mounts; then
            must "qemu-img check of the inner image" only_leaks "$SCRATCH/mnt-below/inner.qcow2"
            must "unmounted below" umount "$SCRATCH/mnt-below"
        fi
    done
    for image in "$SCRATCH"/stack-*.qcow2; do
        must "qemu-img check of ${image##*/}" only_leaks "$image"
        rm "$image"
    done
}

make_fs() { case $1 in xfs) mkfs.xfs -q -f "$2" ;; *) mkfs.ext4 -q -F "$2" ;; esac }
check_fs() { case $1 in xfs) xfs_repair -n "$2" ;; *) e2fsck -fn "$2" ;; esac }

# servers: the processes that serve the story's devices now
servers() { ublk-qcow2 list | sed -n 's/^[^ ]* *serving *\([0-9]*\) .*/\1/p'; }

# kill_servers: one after the other, again and again, until the file $SCRATCH/over is there
kill_servers() {
    local server
    while [ ! -e "$SCRATCH/over" ]; do
        sleep $LIFETIME
        for server in $(servers); do kill -KILL "$server" 2>/dev/null && echo "$server" >>"$SCRATCH/killed"; done
    done
}

# trim: what is free, again and again
trim() { while [ ! -e "$SCRATCH/over" ]; do sleep 3 && fstrim "$mnt"; done; }

# exercise: fsx on several files at once, under kills. The killer ends when all have, so no one waits for a dead server.
exercise() {
    local job all="" failed=""
    rm -f "$SCRATCH/over" "$SCRATCH/killed" && : >"$SCRATCH/killed"
    kill_servers &
    trim >/dev/null 2>&1 &
    for job in $(seq $JOBS); do
        fsx -f "$SCRATCH/fsx.toml" -N "$OPERATIONS" -S "$SEED$round$job" -P "$SCRATCH" "$mnt/fsx-$job" >"$SCRATCH/fsx-$job.out" 2>&1 &
        all="$all $!"
    done
    job=0
    for pid in $all; do
        job=$((job + 1))
        wait "$pid" || failed="$failed $job"
    done
    : >"$SCRATCH/over"
    wait
    for job in $failed; do tail -n 20 "$SCRATCH/fsx-$job.out" | sed 's/^/       | /'; done
    [ -z "$failed" ] || fail "fsx$failed on $kind: data is not as it was written, or an operation failed"
}

# stack KIND: from the image to the file system and back
stack() {
    local what
    kind=$1 devices="" maps="" loop="" TOP=""
    what="$fs on $kind, clusters of $cluster"
    "make_$kind"
    must "mkfs.$fs" make_fs $fs "$TOP"
    must "mounted" mount -t $fs -o discard "$TOP" "$mnt"
    exercise
    must "unmounted" umount "$mnt"
    must "$fs is whole" check_fs $fs "$TOP"
    unmake
    ok "$what: fsx, under $(wc -l <"$SCRATCH/killed") kills"
    [ -s "$SCRATCH/killed" ] || fail "no server was killed"
}

# pick N WORD…
pick() { local n=$1; shift; shift $((n % $#)); echo "$1"; }

# There may be no udev to make the nodes, and dmsetup would wait for it.
[ -d /run/udev ] || export DM_DISABLE_UDEV=1
for module in dm-mod dm-thin-pool dm-crypt dm-snapshot loop xts; do modprobe -q $module; done
start=$(date +%s)
say "Linux $(uname -r), $(fsx --version)"
round=0
while [ $(($(date +%s) - start)) -lt "$SOAK_SECONDS" ] || [ $round = 0 ]; do
    round=$((round + 1))
    turn=$((SEED + round))
    for kind in ${KINDS:-$kinds}; do
        turn=$((turn + 1))
        fs=$(pick $turn xfs ext4)
        cluster=$(pick $turn 64k 4k 2M)
        if [ "$kind" = swap ]; then swap; else stack "$kind"; fi
    done
    ok "round $round: $(($(date +%s) - start)) s since the start"
done
echo "soak ended after $round rounds, $step_count steps, all of them seen to hold"
