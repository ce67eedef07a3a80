# A guest boots from the device, and then from the image through QEMU's own driver. Runs behind lib.sh, in the machine.
# $DISK_kernel: the guest's kernel, which is ours. QEMU's firmware is where our programs are.
image=$SCRATCH/guest.qcow2
mnt=$SCRATCH/mnt
initramfs=$SCRATCH/guest.cpio
# Emulated in an emulated machine.
BOOT_LIMIT=1200
MODULES="virtio_pci virtio_blk ext4 crc32c_generic"
mkdir -p "$mnt"

# make_initramfs: busybox, the modules for the disk, and an init that goes on with the one on the disk
make_initramfs() {
    local root=$SCRATCH/initramfs module
    mkdir -p "$root/bin" "$root/modules" "$root/dev" "$root/root"
    cp /usr/bin/busybox "$root/bin/" || return 1
    for module in $MODULES; do
        modprobe -D "$module" 2>/dev/null | sed -n 's/^insmod //p'
    done | awk '!seen[$1]++ { print $1 }' >"$SCRATCH/modules"
    while read -r module; do
        cp "$module" "$root/modules/" && echo "insmod /modules/${module##*/}"
    done <"$SCRATCH/modules" >"$SCRATCH/insmods"
    {
        echo '#!/bin/busybox sh'
        echo '/bin/busybox --install -s /bin'
        echo 'mount -t devtmpfs devtmpfs /dev'
        cat "$SCRATCH/insmods"
        echo 'mount -t ext4 /dev/vda1 /root && exec switch_root /root /sbin/init'
        echo 'echo "guest: cannot mount its root"'
        echo 'poweroff -f'
    } >"$root/init"
    chmod 755 "$root/init"
    (cd "$root" && find . | cpio -o -H newc >"$initramfs" 2>/dev/null)
}

# make_root: on partition 1, programs with the libraries they need, random bytes, their sums, and an init that
# verifies them and what earlier boots have left, leaves a stamp, and powers off
make_root() {
    local directory
    for directory in bin sbin dev proc files stamps; do mkdir "$mnt/$directory"; done
    cp /usr/bin/busybox "$mnt/bin/" && cp -R "/usr/lib/modules/$(uname -r)" /usr/sbin/mkfs.xfs "$mnt/files/" || return 1
    dd if=/dev/urandom of="$mnt/files/random" bs=64k count=64 2>/dev/null || return 1
    (cd "$mnt" && find files -type f -exec sha256sum {} + >sums) || return 1
    cat >"$mnt/sbin/init" <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -o remount,rw /
exec >/dev/ttyS0 2>&1
boot=$(sed 's/.*boot=\([0-9]*\).*/\1/' /proc/cmdline)
sha256sum -c sums | grep -v ': OK$' && echo "guest: files have changed"
sha256sum -c sums >/dev/null 2>&1 && echo "guest: $(wc -l <sums) files hold"
for stamp in stamps/*; do [ -e "$stamp" ] && echo "guest: stamp of boot $(cat "$stamp")"; done
dd if=/dev/urandom of=files/of-boot-$boot bs=64k count=16 2>/dev/null
sha256sum files/of-boot-$boot >>sums
echo "$boot" >"stamps/$boot"
sync
umount / 2>/dev/null || mount -o remount,ro /
echo "guest: ends boot $boot"
poweroff -f
END
    chmod 755 "$mnt/sbin/init"
}

# boot N DRIVE: what the guest says is in $SCRATCH/boot.N
boot() {
    timeout "$BOOT_LIMIT" qemu-system-x86_64 -L "$PAYLOAD/bin" -nodefaults -no-user-config -display none -no-reboot \
        -machine pc -accel tcg -cpu max -m 512 -kernel "$SCRATCH/kernel" -initrd "$initramfs" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off nowatchdog no_timer_check random.trust_cpu=on boot=$1" \
        -serial "file:$SCRATCH/boot.$1" -drive "if=none,id=root,cache=none,$2" -device virtio-blk-pci,drive=root
}

# heard N TEXT: the guest has said so in boot N
heard() {
    tr -d '\r' <"$SCRATCH/boot.$1" | grep -q -x "guest: $2" && return 0
    tail -n 20 "$SCRATCH/boot.$1" | sed 's/^/       | /'
    fail "in boot $1 the guest has not said \"$2\""
}

say "Linux $(uname -r), $(qemu-system-x86_64 --version | head -n 1)"
cat "$DISK_kernel" >"$SCRATCH/kernel"
must "made the guest's initramfs" make_initramfs
must "made an image" qemu-img create -q -f qcow2 "$image" 1G
attach -q 2 "$image"
echo 'start=2048, type=83, bootable' | sfdisk -q "$DEVICE" || fail "sfdisk on $DEVICE"
must "mkfs.ext4 on partition 1" mkfs.ext4 -q "${DEVICE}p1"
must "mounted" mount -t ext4 "${DEVICE}p1" "$mnt"
must "made the guest's root" make_root
files=$(wc -l <"$mnt/sums")
must "unmounted" umount "$mnt"

must "booted it from $DEVICE" boot 1 "format=raw,file=$DEVICE"
heard 1 "$files files hold"
heard 1 "ends boot 1"
ok "the guest found its $files files as they were, and left a stamp and a file"
detach
must "qemu-img check finds nothing" qemu-img check -q -f qcow2 "$image"

must "booted it from the image, by QEMU's own driver" boot 2 "format=qcow2,file=$image"
heard 2 "$((files + 1)) files hold"
heard 2 "stamp of boot 1"
heard 2 "ends boot 2"
ok "the guest found its $((files + 1)) files and its stamp"
must "qemu-img check finds nothing" qemu-img check -q -f qcow2 "$image"

# And back: what QEMU's driver wrote, through the device.
attach --read-only "$image"
must "mounted partition 1 of $DEVICE" mount -t ext4 -o ro,noload "${DEVICE}p1" "$mnt"
(cd "$mnt" && sha256sum -c sums >"$SCRATCH/sums.out" 2>&1) || fail "files have changed: $(grep -v ': OK$' "$SCRATCH/sums.out")"
[ "$(cat "$mnt/stamps/2")" = 2 ] || fail "the stamp of boot 2 is not there"
must "unmounted" umount "$mnt"
detach
ok "the device shows the files and the stamp of both boots"
