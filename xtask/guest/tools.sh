# The programs of $DISK_tools (xtask's tools.rs), for stories that run behind lib.sh and this.
tools=$SCRATCH/mnt-tools

# tools_at DIR: mounts them; DIR is their /work
tools_at() {
    mkdir -p "$tools" "$SCRATCH/tmp" && chmod 1777 "$SCRATCH/tmp" && mount -t ext4 -o ro "$DISK_tools" "$tools" &&
        mount -t proc proc "$tools/proc" && mount --bind /dev "$tools/dev" &&
        mount --bind "$SCRATCH/tmp" "$tools/tmp" && mount --bind "$1" "$tools/work" || fail "cannot mount the tools"
}

tools_gone() {
    umount "$tools/work" "$tools/tmp" "$tools/dev" "$tools/proc" "$tools" || fail "somebody uses the tools"
}

# in_tools COMMAND…: runs one of them, in /work
in_tools() {
    chroot "$tools" /usr/bin/env -i -C /work PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin HOME=/work LC_ALL=C "$@"
}
