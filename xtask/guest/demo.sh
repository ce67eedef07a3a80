# The story of one image, from nothing to QEMU's verdict. Runs behind lib.sh.
image=$SCRATCH/demo.qcow2
mirror=$SCRATCH/mirror.raw
mnt=$SCRATCH/mnt
mkdir -p "$mnt"

say "Linux $(uname -r), $(qemu-img --version | head -n 1)"
must "qemu-img made a 1 GiB image, $(basename "$image")" qemu-img create -q -f qcow2 "$image" 1G

attach "$image"
ok "ublk-qcow2 add: $DEVICE is a block device of $(($(blockdev --getsize64 "$DEVICE") >> 20)) MiB"

must "mkfs.xfs on $DEVICE" mkfs.xfs -q -f "$DEVICE"
must "mounted" mount -t xfs "$DEVICE" "$mnt"

# Real files: the programs of this system, and one that does not compress.
mkdir "$mnt/programs"
find /usr/bin /usr/sbin /usr/lib -type f -size -2048k 2>/dev/null | sort | head -n 120 | while read -r file; do
    cp "$file" "$mnt/programs/" || exit 1
done || fail "cannot copy files into the new file system"
dd if=/dev/urandom of="$mnt/random" bs=1M count=32 2>/dev/null || fail "cannot write a file of 32 MiB"
(cd "$mnt" && find . -type f -exec sha256sum {} + >"$SCRATCH/sums") || fail "cannot sum the files"
ok "wrote $(wc -l <"$SCRATCH/sums") files, $(du -sm "$mnt" | cut -f1) MiB"

must "unmounted" umount "$mnt"
must "xfs_repair -n finds the file system sound" xfs_repair -n "$DEVICE"
must "mounted again" mount -t xfs "$DEVICE" "$mnt"
(cd "$mnt" && sha256sum -c "$SCRATCH/sums" >"$SCRATCH/sums.out" 2>&1) || {
    grep -v ': OK$' "$SCRATCH/sums.out" | head
    fail "files have changed"
}
ok "every file reads back with the same SHA-256"
rm "$mnt/random" || fail "cannot delete a file"
if fstrim "$mnt" 2>"$SCRATCH/trim.err"; then
    ok "deleted 32 MiB and trimmed the free space"
else
    fail "fstrim: $(cat "$SCRATCH/trim.err")"
fi
must "unmounted" umount "$mnt"

must "copied what $DEVICE shows to a raw mirror" qemu-img convert -q -f raw -O raw "$DEVICE" "$mirror"
detach
ok "ublk-qcow2 del: the device is gone"

if verdict=$(qemu-img check -f qcow2 "$image" 2>&1); then
    ok "qemu-img check: $(printf '%s' "$verdict" | head -n 1)"
else
    printf '%s\n' "$verdict"
    fail "qemu-img check finds fault with the image"
fi
if verdict=$(qemu-img compare -f qcow2 -F raw "$image" "$mirror" 2>&1); then
    ok "qemu-img compare, image against mirror: $verdict"
else
    printf '%s\n' "$verdict"
    fail "qemu-img compare: the image is not what the device showed"
fi
the_end
