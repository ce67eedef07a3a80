# Reads the user's own image through the device and changes nothing. Runs behind lib.sh.
# IMAGES lists the image and its backing files, a line each: disk name, length in bytes, path.
# In the machine each arrives as a read-only disk; it is copied to a file of its exact length, which is put at the
# path that it has on the host, so that names of backing files hold.
top=$(printf '%s\n' "$IMAGES" | head -n 1 | cut -f3)

place_files() {
    local name length path
    while IFS=$'\t' read -r name length path; do
        head -c "$length" "/dev/disk/$name" >"$SCRATCH/$name" || fail "cannot copy $path into the machine"
        if ! { mkdir -p "$(dirname "$path")" && : >"$path" && mount --bind "$SCRATCH/$name" "$path"; }; then
            fail "cannot put a file at $path in the machine"
        fi
    done <<<"$IMAGES"
}

# stamp_files: sizes, times and the first MiB, where the header is. Any write changes the time; a sum over all of a
# large image would take longer than everything else.
stamp_files() {
    local name length path
    while IFS=$'\t' read -r name length path; do
        stat -c '%n %s %y' "$path"
        head -c 1048576 "$path" | sha256sum
    done <<<"$IMAGES"
}

same_as_sent() {
    local name length path
    while IFS=$'\t' read -r name length path; do
        head -c "$length" "/dev/disk/$name" | cmp -s - "$path" || return 1
    done <<<"$IMAGES"
}

show_partitions() {
    local part type mnt=$SCRATCH/mnt
    if ! sfdisk -l "$DEVICE" >"$SCRATCH/table" 2>&1 || ! grep -q '^/dev/' "$SCRATCH/table"; then
        say "no partition table; the device as a whole is: $(blkid "$DEVICE" | cut -d: -f2-)"
    fi
    grep '^/dev/' "$SCRATCH/table" | while read -r line; do say "$line"; done
    [ -n "${IN_MACHINE:-}" ] || return 0 # no foreign file system is mounted on the user's own kernel
    mkdir -p "$mnt"
    for part in "$DEVICE" "$DEVICE"p*; do
        [ -b "$part" ] || continue
        for type in ext4 xfs vfat btrfs; do
            case $type in
            ext4) options=ro,noload ;;
            xfs) options=ro,norecovery ;;
            *) options=ro ;;
            esac
            mount -t $type -o $options "$part" "$mnt" 2>/dev/null || continue
            ok "$part: $type, $(find "$mnt" -xdev -type f | wc -l) files; at the top: $(find "$mnt" -mindepth 1 -maxdepth 1 | sed 's,.*/,,' | sort | head -n 12 | tr '\n' ' ')"
            umount "$mnt"
            break
        done
    done
}

say "Linux $(uname -r), $(qemu-img --version | head -n 1)"
say "image: $top"
if [ -n "${IN_MACHINE:-}" ]; then
    place_files
fi
before=$(stamp_files)

attach --read-only "$top"
ok "ublk-qcow2 add --read-only: $DEVICE is a block device of $(blockdev --getsize64 "$DEVICE") bytes"
[ "$(blockdev --getro "$DEVICE")" = 1 ] || fail "$DEVICE is writable"
ok "$DEVICE is read-only"
show_partitions
if verdict=$(qemu-img compare -f raw -F qcow2 "$DEVICE" "$top" 2>&1); then
    ok "qemu-img compare, device against image: $verdict"
else
    printf '%s\n' "$verdict"
    fail "qemu-img compare: the device does not show what QEMU reads in the image"
fi
detach
ok "ublk-qcow2 del: the device is gone"

[ "$before" = "$(stamp_files)" ] || fail "the image has changed"
if [ -n "${IN_MACHINE:-}" ]; then
    same_as_sent || fail "the image has changed"
fi
ok "the image is unchanged"
the_end
