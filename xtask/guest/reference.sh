# What a build on the device is held against: the same build, made by the same tools under the same name, on a directory of
# this host. Runs behind lib.sh, tools.sh and kernel.sh. DISK_source: the whole tree's archive. DISK_tools: a directory.
# Leaves source.tar (what a build needs), and reference.tar: the sums of all that is there when it is made, and the
# compiler's results.

# In mounts of its own, which end with it, however it ends: below them is this host's /dev.
if [ -z "${OWN_MOUNTS-}" ]; then
    [ "$(id -u)" = 0 ] || user=--map-root-user
    OWN_MOUNTS=1 exec unshare --mount ${user-} bash "$0"
fi

# not_built: what no small kernel needs: other machines, and what drivers, protocols and file systems are made of. Their
# Kconfig stays.
not_built() {
    local part
    printf "$top/%s\n" 'Documentation/*/*' 'arch/[!x]*/*.[chS]' 'arch/[!x]*/*.dts*' 'arch/[!x]*/boot/*' \
        'arch/[!x]*/configs/*' 'samples/*.[ch]' 'sound/*.[ch]' 'net/*.[ch]' \
        '*.rs' 'LICENSES/*' 'tools/[!aisb]*' 'tools/bpf/*' 'tools/build/feature/*.c' 'tools/sched*' 'tools/spi*' 'tools/iio*'
    for part in accel acpi ata atm block bluetooth clk comedi counter cpufreq crypto dma edac firmware fpga gpio gpu hid hwmon \
        i2c iio infiniband input iommu isdn leds md media memstick mfd misc mmc mtd net nfc ntb nvme pci phy pinctrl platform \
        power ptp regulator remoteproc s390 scsi soc soundwire spi staging target tee thermal thunderbolt tty ufs usb vdpa \
        vfio vhost video w1 watchdog xen; do
        printf '%s/drivers/%s/*.[ch]\n' "$top" $part
    done
    for part in bcachefs btrfs ceph ext4 f2fs gfs2 jfs nfs nfsd ntfs3 ocfs2 smb ubifs xfs; do
        printf '%s/fs/%s/*.[ch]\n' "$top" $part
    done
}

mkdir -p "$SCRATCH/work/linux" "$tools" "$AROUND/ccache"
top=$(tar -tf "$DISK_source" 2>/dev/null | head -n 1 | cut -d/ -f1)
[ -n "$top" ] || fail "the archive of the source tree is empty"
not_built >"$SCRATCH/not-built"
must "unpacked what a build needs" \
    tar -x -f "$DISK_source" --anchored -X "$SCRATCH/not-built" --strip-components=1 --no-same-owner -C "$SCRATCH/work/linux"
say "$(find "$SCRATCH/work" -type f | wc -l) files, $(du -sm "$SCRATCH/work" | cut -f1) MiB"
must "packed it" tar -c -f "$RESULTS/source.tar" --owner=0 --group=0 -C "$SCRATCH/work" linux

mount --bind "$DISK_tools" "$tools" && mount --rbind /proc "$tools/proc" && mount --rbind /dev "$tools/dev" &&
    mount --bind "$AROUND" "$tools/tmp" && mount --bind "$SCRATCH/work" "$tools/work" || fail "cannot mount the tools"
kernel_build
kernel_reuse
in_tools ccache --dir $results --zero-stats >/dev/null
sums "$SCRATCH/work" >"$SCRATCH/reference" || fail "cannot sum what was built"
must "kept the sums" tar -c -f "$RESULTS/reference.tar" --owner=0 --group=0 -C "$SCRATCH" reference -C "$AROUND" ccache
ok "built on this host: $(wc -l <"$SCRATCH/reference") files"
