# Swap space on a device of ours while memory is short and the servers are killed. Used by stack.sh, behind lib.sh.
# A server that asks for memory which only its own device could free, or whose successor does, is never done.
# Only in the machine: a host's memory is not ours to take.
SWAP_KILLS=6
# What is left to the system, and what each of two programs wants; in MiB.
LEFT_MIB=400
WANTED_MIB=300
# An emulated machine takes a tenth of this.
SWAP_LIMIT=1200
huge_pages=/proc/sys/vm/nr_hugepages

meminfo() { sed -n "s/^$1: *\([0-9]*\) kB/\1/p" /proc/meminfo; }

# vmstat_of NAME: pages
vmstat_of() { sed -n "s/^$1 //p" /proc/vmstat; }

# take_memory: all but LEFT_MIB, as huge pages that nobody uses
take_memory() {
    sync && echo 3 >/proc/sys/vm/drop_caches
    echo $((($(meminfo MemAvailable) / 1024 - LEFT_MIB) / 2)) >$huge_pages
    say "$(($(meminfo MemAvailable) / 1024)) MiB of memory are left"
}

# numbers: the same WANTED_MIB each time
numbers() { seq "$SEED" 999999999 | head -c $((WANTED_MIB << 20)); }

# anonymous: until it is over. tail keeps all of it in its own memory.
anonymous() {
    local wanted
    wanted=$(numbers | sha256sum)
    until [ -e "$SCRATCH/over" ]; do
        [ "$(numbers | tail -c $((WANTED_MIB << 20)) | sha256sum)" = "$wanted" ] || return 1
        echo anonymous >>"$SCRATCH/passes"
    done
}

# shared: until it is over. What a tmpfs keeps is swapped out as well.
shared() {
    until [ -e "$SCRATCH/over" ]; do
        fio --directory=/dev/shm --name=swap --size=${WANTED_MIB}M --rw=randwrite --bs=4k --ioengine=psync --invalidate=0 \
            --randseed="$SEED" --verify=crc32c --verify_fatal=1 --do_verify=1 >"$SCRATCH/shared.out" 2>&1 || return 1
        echo shared >>"$SCRATCH/passes"
    done
}

# kill_while_swapping PROGRAM…: each server when it has served for a while, SWAP_KILLS of them, until both programs have come
# round, or one has ended, which they do not by themselves
kill_while_swapping() {
    local server program
    until [ "$(wc -l <"$SCRATCH/killed")" -ge $SWAP_KILLS ] && [ "$(sort -u "$SCRATCH/passes" | wc -l)" = 2 ]; do
        sleep $((LIFETIME * 2))
        [ "$(date +%s)" -lt "$give_up" ] || return 1
        for program in "$@"; do kill -0 "$program" 2>/dev/null || return 0; done
        for server in $(servers); do kill -KILL "$server" 2>/dev/null && echo "$server" >>"$SCRATCH/killed"; done
    done
}

# stuck: who waits in the kernel, and for what
stuck() {
    local task
    for task in /proc/[0-9]*/task/[0-9]*; do
        grep -q '^State:.D' "$task/status" 2>/dev/null || continue
        echo "$task $(cat "$task/comm")" && cat "$task/stack"
    done 2>/dev/null | sed 's/^/       | /'
    say "memory left: $(meminfo MemFree) kB, swap left: $(meminfo SwapFree) of $(meminfo SwapTotal) kB"
    ublk-qcow2 list | sed 's/^/       | /'
}

swap() {
    local programs="" program give_up=$(($(date +%s) + SWAP_LIMIT)) failed="" swapped
    [ -n "${IN_MACHINE:-}" ] || fail "swap: only in the machine; a host's memory is not ours to take"
    kind=swap devices="" maps="" loop=""
    below 1 2G
    must "mkswap" mkswap "$DEVICE"
    must "swapon" swapon "$DEVICE"
    rm -f "$SCRATCH/over" && : >"$SCRATCH/killed" && : >"$SCRATCH/passes"
    take_memory
    swapped=$(vmstat_of pswpout)
    for program in anonymous shared; do
        $program &
        programs="$programs $!"
    done
    # shellcheck disable=SC2086 # one word per program
    kill_while_swapping $programs || {
        stuck
        fail "swap: after $SWAP_LIMIT s and $(wc -l <"$SCRATCH/killed") kills the programs that swap are not done"
    }
    : >"$SCRATCH/over"
    for program in $programs; do wait "$program" || failed=yes; done
    [ -z "$failed" ] || {
        dmesg | tail -n 30 | cat - "$SCRATCH/shared.out" | sed 's/^/       | /'
        fail "swap: memory is not what it was, or a program was killed"
    }
    rm -f /dev/shm/swap*
    echo 0 >$huge_pages
    swapped=$((($(vmstat_of pswpout) - swapped) / 256))
    [ "$swapped" -gt $WANTED_MIB ] || fail "only $swapped MiB were swapped out"
    must "swapoff" swapoff "$DEVICE"
    unmake
    ok "swap, clusters of $cluster: $(wc -l <"$SCRATCH/passes") passes, $swapped MiB swapped out, under $(wc -l <"$SCRATCH/killed") kills"
}
