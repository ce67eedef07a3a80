#!/bin/sh
# First process of the throw-away machine. Prepares it, runs /payload/run with its output on the virtio console,
# says on the second serial port that it begins, and the exit status, and powers off. Disks are known by their serial names.
export PATH=/payload/bin:/usr/sbin:/usr/bin HOME=/root TERM="${TERM:-linux}" LANG=C.UTF-8
export SCRATCH=/scratch RESULTS=/results PAYLOAD=/payload IN_MACHINE=1

finish() {
    sync
    echo "exit $1" >/dev/ttyS1
    poweroff -f
    sleep 60
}

# What fails in here is said on the console, and the status tells the host that nothing has run.
broken() {
    echo "machine: $*" >/dev/console
    finish 125
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/disk /run/lock
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
modprobe -q configfs
mount -t configfs configfs /sys/kernel/config 2>/dev/null
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
hostname machine

modprobe -q virtio_pci
modprobe -q virtio_blk || broken "no virtio_blk"
modprobe ublk_drv || broken "no ublk_drv"
modprobe -q ext4
modprobe -q xfs

for block in /sys/block/vd*; do
    serial=$(cat "$block/serial" 2>/dev/null)
    [ -n "$serial" ] && ln -s "/dev/${block##*/}" "/dev/disk/$serial"
done

mkdir -p /dev/port
for port in /sys/class/virtio-ports/*; do
    name=$(cat "$port/name" 2>/dev/null)
    [ -n "$name" ] && ln -s "/dev/${port##*/}" "/dev/port/$name"
done

cd / || broken "no root directory"
cpio -idmu <"$(readlink -f /dev/disk/payload)" 2>/tmp/cpio.err || broken "the payload: $(cat /tmp/cpio.err)"
[ -x /payload/run ] || broken "the payload has no /payload/run"
if [ -e /dev/disk/scratch ]; then
    mount -t ext4 -o discard /dev/disk/scratch /scratch || broken "no scratch file system"
fi
[ -c /dev/ublk-control ] || broken "no /dev/ublk-control"
[ -c /dev/hvc0 ] || broken "no virtio console"
echo begun >/dev/ttyS1

cd /scratch || broken "no /scratch"
if [ -e /payload/interactive ]; then
    setsid -c /payload/run <>/dev/hvc0 >&0 2>&1
else
    stty raw -echo </dev/hvc0
    setsid /payload/run </dev/null >/dev/hvc0 2>&1
fi
status=$?

cd /
if [ -e /dev/disk/results ]; then
    tar -cf /dev/disk/results -C /results . || status=125
fi
umount /scratch 2>/dev/null
finish $status
