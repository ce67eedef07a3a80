# Measures the engines side by side: the same fio job on a block device that each of them makes of the same image.
# Set by xtask: ENGINES, WORKLOADS, ROUNDS, LIMIT (a fio option that ends a job), all but LIMIT lists of words.
# Leaves $RESULTS/ROUND.ENGINE.WORKLOAD.json, fio's own account. The order of engines alternates between rounds.
set -u
: "${ENGINES:?}" "${WORKLOADS:?}" "${ROUNDS:?}" "${LIMIT:?}"
SIZE_MIB=512
DEPTH=128
base=$SCRATCH/bench
NODE=

die() {
    printf 'bench: %s\n' "$*"
    exit 1
}

# In the machine: ext4 on memory, so that no disk of the host has a part in the result.
prepare_storage() {
    local nullb=/sys/kernel/config/nullb/bench
    mkdir -p "$base"
    [ -n "${IN_MACHINE:-}" ] || return 0
    modprobe null_blk nr_devices=0 || die "no null_blk"
    mkdir "$nullb" || die "null_blk has no configfs"
    echo 1 >$nullb/memory_backed && echo 2048 >$nullb/size && echo 512 >$nullb/blocksize && echo 1 >$nullb/discard
    echo 0 >$nullb/irqmode # complete at once
    echo 1 >$nullb/power || die "null_blk does not start"
    local disk
    for disk in /dev/bench /dev/nullb*; do
        [ -b "$disk" ] && break
    done
    # Or the kernel would go on initialising it while the first engines are measured.
    mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "$disk" || die "cannot format $disk"
    mount -o discard "$disk" "$base" || die "cannot mount $disk"
}

prepare_images() {
    qemu-img create -q -f qcow2 -o preallocation=full "$base/full.qcow2" ${SIZE_MIB}M || die "cannot make an image"
    dd if=/dev/zero of="$base/full.raw" bs=1M count=$SIZE_MIB 2>/dev/null || die "cannot make a raw file"
    sync
}

# wait_for_device: until NODE is a block device with a size. A fio on a name that is no device would make a file.
wait_for_device() {
    local tries
    for tries in $(seq 100); do
        [ -b "$NODE" ] && [ "$(blockdev --getsize64 "$NODE" 2>/dev/null || echo 0)" -gt 0 ] && return 0
        sleep 0.1
    done
    die "$1: $NODE is no block device after $tries tries"
}

# attach ENGINE IMAGE: leaves the device in NODE
attach() {
    case $1 in
    qemu-nbd)
        NODE=/dev/nbd0
        modprobe nbd nbds_max=1 max_part=0 || die "no nbd"
        timeout 60 qemu-nbd -c $NODE -f qcow2 --cache=none --aio=io_uring "$2"
        ;;
    rublk-qcow2)
        NODE=/dev/ublkb0
        timeout 60 rublk add qcow2 -n 0 -q 1 -d $DEPTH --quiet -f "$2" >/dev/null
        ;;
    rublk-loop)
        NODE=/dev/ublkb0
        timeout 60 rublk add loop -n 0 -q 1 -d $DEPTH --quiet -f "$2" >/dev/null
        ;;
    ublk-qcow2)
        NODE=/dev/ublkb0
        timeout 60 ublk-qcow2 add -n 0 -q 1 -d $DEPTH --io direct "$2" >/dev/null
        ;;
    *) die "unknown engine $1" ;;
    esac || die "$1 does not attach $2"
    wait_for_device "$1"
}

detach() {
    local tries
    case $1 in
    qemu-nbd) timeout 60 qemu-nbd -d $NODE >/dev/null ;;
    rublk-*) timeout 60 rublk del -n 0 >/dev/null ;;
    ublk-qcow2) timeout 60 ublk-qcow2 del -n 0 >/dev/null ;;
    esac || die "$1 does not detach"
    # The server of the next engine must not share the processor with the exit of this one.
    for tries in $(seq 100); do
        pidof qemu-nbd rublk ublk-qcow2 >/dev/null || return 0
        sleep 0.1
    done
    die "$1 still runs after $tries tries"
}

# options_of WORKLOAD: fio's --rw and --bs
options_of() {
    case $1 in
    randwrite-4k | empty-randwrite-4k) echo --rw=randwrite --bs=4k ;;
    randread-4k) echo --rw=randread --bs=4k ;;
    randrw-4k) echo --rw=randrw --bs=4k ;;
    rw-512k) echo --rw=rw --bs=512k ;;
    *) die "unknown workload $1" ;;
    esac
}

# image_of ENGINE WORKLOAD: the file to attach, made anew when it has to be empty
image_of() {
    case $1,$2 in
    rublk-loop,*) echo "$base/full.raw" ;;
    *,empty-*)
        rm -f "$base/empty.qcow2"
        qemu-img create -q -f qcow2 "$base/empty.qcow2" ${SIZE_MIB}M || die "cannot make an image"
        echo "$base/empty.qcow2"
        ;;
    *) echo "$base/full.qcow2" ;;
    esac
}

# limit_of WORKLOAD: where jobs end after a number of requests, large requests end sooner
limit_of() {
    case $1,$LIMIT in
    rw-512k,--number_ios=*) echo "--number_ios=$((${LIMIT#*=} / 32))" ;;
    *) echo "$LIMIT" ;;
    esac
}

measure() {
    local round=$1 engine=$2 workload=$3 image options limit out
    image=$(image_of "$engine" "$workload") || exit 1
    options=$(options_of "$workload") || exit 1
    limit=$(limit_of "$workload")
    out=$RESULTS/$round.$engine.$workload.json
    attach "$engine" "$image"
    # shellcheck disable=SC2086 # both are lists of options
    if fio --name=bench --filename="$NODE" --ioengine=libaio --direct=1 --iodepth=64 --numjobs=1 \
        --size=${SIZE_MIB}M --randrepeat=1 --norandommap $options $limit \
        --output-format=json --output="$out" >/dev/null 2>"$SCRATCH/fio.err"; then
        printf 'bench: round %s %-12s %s\n' "$round" "$engine" "$workload"
    else
        # A peer that fails a workload has no figure there; that is a result too.
        printf 'bench: round %s %-12s %s FAILED: %s\n' "$round" "$engine" "$workload" "$(head -n 1 "$SCRATCH/fio.err")"
        rm -f "$out"
    fi
    detach "$engine"
    case $image in *.qcow2)
        qemu-img check -q -f qcow2 "$image" >/dev/null 2>&1 ||
            printf 'bench: qemu-img check finds fault with the image that %s leaves after %s\n' "$engine" "$workload"
        ;;
    esac
    rm -f "$base/empty.qcow2"
}

cleanup() {
    case $NODE in
    /dev/ublkb*) [ -b "$NODE" ] && { ublk-qcow2 del -n 0 || rublk del -n 0; } >/dev/null 2>&1 ;;
    esac
}
trap cleanup EXIT

prepare_storage
prepare_images
for round in $(seq "$ROUNDS"); do
    order=$ENGINES
    [ $((round % 2)) = 0 ] && order=$(printf '%s' "$ENGINES" | tr ' ' '\n' | tac | tr '\n' ' ')
    for workload in $WORKLOADS; do
        for engine in $order; do
            case $engine,$workload in rublk-loop,empty-*) continue ;; esac # a raw file is never empty
            measure "$round" "$engine" "$workload"
        done
    done
done
