# Measures the engines: a block device of an image by each of them, and the same fio on it.
# xtask (bench/plan.rs) appends one line per image and per measurement, each a call of `image`, `speed`,
# `attach_time` or `memory`, and reads what they leave: $RESULTS/ROUND.ENGINE.ROW.facts, lines of key=value, and
# $RESULTS/ROUND.ENGINE.ROW.json, fio's account. Set by xtask: DEPTH, the depth of every device's one queue, and PATIENCE.
# A machine that has qemu-mark counts what is executed (bench --profile, see `set_apart` and `mark`).
set -u
: "${DEPTH:?}" "${PATIENCE:?}"
base=$SCRATCH/bench
NODE=
FACTS=
marks=0

die() {
    printf 'bench: %s\n' "$*"
    exit 1
}

# fact KEY VALUE: one line for the measurement under way
fact() { printf '%s=%s\n' "$1" "$2" >>"$FACTS"; }

# storage [FILE SYSTEM]: ext4 on memory, so that no disk of the host has a part in the result; empty, or a copy
storage() {
    local nullb=/sys/kernel/config/nullb/bench disk
    mkdir -p "$base"
    # ext4 takes the best checksum that there is when it is mounted; installed systems load this, later kernels have it in.
    modprobe -q crc32c-intel
    modprobe null_blk nr_devices=0 || die "no null_blk"
    mkdir "$nullb" || die "null_blk has no configfs"
    echo 1 >$nullb/memory_backed && echo 2048 >$nullb/size && echo 512 >$nullb/blocksize && echo 1 >$nullb/discard
    echo 0 >$nullb/irqmode # complete at once
    echo 1 >$nullb/power || die "null_blk does not start"
    for disk in /dev/bench /dev/nullb*; do
        [ -b "$disk" ] && break
    done
    if [ -n "${1:-}" ]; then
        qemu-img convert -n --target-is-zero -f raw -O raw "$1" "$disk" || die "cannot copy $1"
    else
        # Or the kernel would go on initialising it while the first engines are measured.
        mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$disk" || die "cannot format $disk"
    fi
    # Without discard: of an image that was removed it would go on beneath the next measurement.
    mount "$disk" "$base" || die "cannot mount $disk"
    cd "$base" || die "no $base" # rublk looks for backing files in its working directory
    ! command -v qemu-mark >/dev/null || set_apart
    modprobe nbd nbds_max=1 max_part=0 || die "no nbd"
    modprobe loop max_loop=1 || die "no loop"
    local tools
    tools=$(fio --version; qemu-nbd --version | sed 's,^/[^ ]*/,,; q'; ! command -v rublk >/dev/null || rublk --version)
    printf '%s\n' "$tools" >"$RESULTS/versions"
    uname -r >>"$RESULTS/versions"
}

# image COMMAND: makes an image. What is cached of it would make the first engine's direct I/O slow.
image() {
    bash -c "$1" || die "cannot make an image: $1"
    sync
    echo 1 >/proc/sys/vm/drop_caches
}

# wait_for_device: until NODE is a block device with a size. A fio on a name that is no device would make a file.
wait_for_device() {
    local tries
    for tries in $(seq 100); do
        [ -b "$NODE" ] && [ "$(blockdev --getsize64 "$NODE" 2>/dev/null || echo 0)" -gt 0 ] && return 0
        sleep 0.1
    done
    return 1
}

# attach ENGINE IMAGE: leaves the device in NODE; what the engine says in $SCRATCH/said
attach() {
    NODE=/dev/ublkb0
    case $1 in
    qemu-nbd)
        NODE=/dev/nbd0
        timeout 60 qemu-nbd -c $NODE -f qcow2 --cache=none --aio=io_uring "$2"
        ;;
    rublk-qcow2) timeout 60 rublk add qcow2 -n 0 -q 1 -d "$DEPTH" --quiet -f "$2" ;;
    rublk-loop) timeout 60 rublk add loop -n 0 -q 1 -d "$DEPTH" --quiet -f "$2" ;;
    kernel-loop)
        NODE=/dev/loop0
        losetup --direct-io=on $NODE "$2" && [ "$(cat /sys/block/loop0/loop/dio)" = 1 ]
        ;;
    ublk-qcow2) timeout 60 ublk-qcow2 add -n 0 -q 1 -d "$DEPTH" --io direct "$2" ;;
    *) die "unknown engine $1" ;;
    esac >"$SCRATCH/said" 2>&1 && wait_for_device
}

detach() {
    local tries
    case $1 in
    qemu-nbd) timeout 60 qemu-nbd -d $NODE ;;
    rublk-*) timeout 60 rublk del -n 0 ;;
    kernel-loop) losetup -d $NODE ;;
    ublk-qcow2) timeout 60 ublk-qcow2 del -n 0 ;;
    esac >"$SCRATCH/said" 2>&1 || return 1
    # The server of the next engine must not share the processor with the exit of this one.
    for tries in $(seq 100); do
        pidof qemu-nbd rublk ublk-qcow2 >/dev/null || return 0
        sleep 0.1
    done
    return 1
}

# begin ROUND ENGINE ROW: false when there is no point in it, because the engine has failed at this row before
begin() {
    local before="$SCRATCH/failed.$2.$3"
    FACTS=$RESULTS/$1.$2.$3.facts
    : >"$FACTS"
    printf 'bench: round %s %-12s %s' "$1" "$2" "$3"
    [ -e "$before" ] || return 0
    fact failed "$(cat "$before")"
    printf ' failed before\n'
    return 1
}

# failed WHAT: the measurement under way has no figure. A peer that fails is a result too. Directories are left out.
failed() {
    local why name=${FACTS##*/}
    why="$1: $(tr '\n' ' ' <"$SCRATCH/said" | sed 's,/[^ ]*/,,g' | tail -c 300)"
    fact failed "$why"
    printf '%s\n' "$why" >"$SCRATCH/failed.$(printf '%s' "${name%.facts}" | cut -d . -f 2-)"
    rm -f "${FACTS%.facts}.json"
    printf ' FAILED: %s\n' "$why"
}

# evict: what does not go by itself is killed, so that the other engines can be measured
evict() {
    local pid
    for pid in $(pidof qemu-nbd rublk ublk-qcow2); do
        kill -9 "$pid"
    done
    sleep 1
    if [ -e /dev/ublkb0 ] || [ -e /dev/ublkc0 ]; then
        timeout 30 ublk-qcow2 del -n 0 || timeout 30 rublk del -n 0
    fi >/dev/null 2>&1
    [ ! -e /dev/ublkb0 ] && [ ! -e /dev/ublkc0 ]
}

# attached ENGINE IMAGE: attaches, or says that there will be no figure
attached() {
    attach "$1" "$2" && return 0
    failed "does not attach"
    detach "$1" || evict || die "$1 leaves a device behind, so nothing else can be measured"
    return 1
}

# end ENGINE IMAGE: detaches, and in the first round has an image checked that was written to
end() {
    if ! detach "$1"; then
        failed "does not detach"
        evict || die "$1 leaves a device behind, so nothing else can be measured"
    fi
    case $FACTS,$2 in
    */1.*write-*,*.qcow2 | */1.*rw-*,*.qcow2)
        qemu-img check -q -f qcow2 "$2" >/dev/null 2>&1
        fact check $?
        ;;
    esac
}

# resident: of all processes of the engine, now and at most, in KiB
resident() {
    local pid
    for pid in $(pidof qemu-nbd rublk ublk-qcow2); do
        cat "/proc/$pid/status"
    done | awk '/^VmRSS/ { now += $2 } /^VmHWM/ { most += $2 } END { print "rss_kib=" now + 0; print "peak_kib=" most + 0 }' >>"$FACTS"
}

# drive [FIO OPTION]…: an engine that does not answer is killed after $PATIENCE seconds, or fio would wait for it for ever
drive() {
    local watch status
    (
        sleep "$PATIENCE"
        # shellcheck disable=SC2046 # there may be several
        kill -9 $(pidof qemu-nbd rublk ublk-qcow2)
    ) &
    watch=$!
    fio --name=bench --filename="$NODE" --ioengine=libaio --direct=1 --norandommap --randrepeat=1 \
        --group_reporting --output-format=json --output="${FACTS%.facts}.json" "$@" >"$SCRATCH/said" 2>&1
    status=$?
    kill "$watch"
    wait "$watch" 2>/dev/null
    return $status
}

# set_apart: QEMU translates code once for all who have it in memory, at the address of the first, and that is what its
# plugin is told. So that addresses tell a server's code from all other, it is always at the same ones, where others are
# at random ones, and has its libraries to itself.
set_apart() {
    local apart=$SCRATCH/apart name path
    mkdir -p "$apart/bin" "$apart/lib"
    for name in qemu-nbd rublk ublk-qcow2; do
        path=$(command -v $name) || continue
        LD_TRACE_LOADED_OBJECTS=1 "$path" | awk '$2 == "=>" && $3 ~ "^/" { print $3 }' | while read -r library; do
            cp -L "$library" "$apart/lib/"
        done
        printf '#!/bin/sh\nexec setarch -R env LD_LIBRARY_PATH=%s %s "$@"\n' "$apart/lib" "$path" >"$apart/bin/$name"
        chmod +x "$apart/bin/$name"
    done
    PATH=$apart/bin:$PATH
}

# mark: where the machine counts what is executed, its plugin writes a file of what was since the last mark, and numbers
# them from 0
mark() {
    ! command -v qemu-mark >/dev/null && return
    qemu-mark && marks=$((marks + 1))
}

# counted: a mark that ends what a profile is made of; the server's mappings and the kernel's symbols tell whose it is
counted() {
    local pid
    ! command -v qemu-mark >/dev/null && return
    mark || return
    fact counted $((marks - 1))
    for pid in $(pidof qemu-nbd rublk ublk-qcow2); do
        cat "/proc/$pid/maps"
    done >"${FACTS%.facts}.maps"
    cat /proc/kallsyms >"$RESULTS/kallsyms" # with all modules that there are by now
}

# speed ROUND ENGINE ROW IMAGE SETTLING WARM [FIO OPTION]…: after so many seconds; of so many requests, before the ones
# that count, nothing is kept
speed() {
    local engine=$2 image=$4 settling=$5 warm=$6
    begin "$1" "$2" "$3" || return 0
    shift 6
    attached "$engine" "$image" || return 0
    sleep "$settling"
    if { [ "$warm" = 0 ] || drive "$@" --number_ios="$warm"; } && mark && drive "$@" && counted; then
        resident
        printf '\n'
    else
        failed "fio fails"
    fi
    end "$engine" "$image"
}

# attach_time ROUND ENGINE ROW IMAGE: to the end of the first read
attach_time() {
    local engine=$2 image=$4 from to
    begin "$1" "$2" "$3" || return 0
    mark || die "the machine does not count"
    from=$EPOCHREALTIME
    attached "$engine" "$image" || return 0
    if dd if=$NODE of=/dev/null bs=4096 count=1 iflag=direct 2>"$SCRATCH/said"; then
        to=$EPOCHREALTIME
        counted
        fact attach_us $((${to/./} - ${from/./}))
        printf '\n'
    else
        failed "does not read"
    fi
    end "$engine" "$image"
}

# memory ROUND ENGINE ROW IMAGE [FIO OPTION]…: without options, of a device that nobody has used
memory() {
    local engine=$2 image=$4
    begin "$1" "$2" "$3" || return 0
    shift 4
    attached "$engine" "$image" || return 0
    if [ $# -gt 0 ] && ! drive "$@"; then
        failed "fio fails"
    else
        sleep 3 # a second after attaching ours takes what it holds of itself
        resident
        printf '\n'
    fi
    end "$engine" "$image"
}

