#!/usr/bin/env bash
# Tests the store on a real NFS: a server and two clients, each a virtual machine (emulated, so that
# no /dev/kvm is needed) that reads this machine's disk and writes only to memory. As root, on Debian:
#
#     apt-get install --yes --no-install-recommends qemu-system-x86 linux-image-amd64 \
#         nfs-kernel-server nfs-common busybox-static cpio iproute2
#     make setup && tests/nfs/run.sh
#
# Eight processes on two machines build the same three artifacts (contend.py): undisturbed, then with
# the building process killed, then with its machine lost. Takes two or three minutes; exits with 0
# if each artifact is built once and every surviving process reads it in time.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernel=$(ls /boot/vmlinuz-*-amd64 | grep -v cloud | sort -V | tail -1)
version=${kernel#/boot/vmlinuz-}
work=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$work"' EXIT

# an initramfs with the drivers that read this machine's disk
root=$work/initrd
mkdir -p "$root"/{bin,proc,sys,dev,newroot} "$root/lib/modules/$version/kernel"
cp /bin/busybox "$root/bin/"
for command in sh mount modprobe switch_root; do ln -s busybox "$root/bin/$command"; done
(
    cd "/lib/modules/$version"
    cp modules.* "$root/lib/modules/$version/"
    cp --parents -r kernel/{drivers/virtio,net/9p,fs/9p,fs/netfs,fs/fscache} "$root/lib/modules/$version/"
)
cat >"$root/init" <<END
#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in virtio_pci 9pnet_virtio 9p; do modprobe \$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288,cache=loose root /newroot
for folder in proc sys dev; do mount --move /\$folder /newroot/\$folder; done
exec switch_root /newroot /bin/bash $here/boot.sh
END
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/initrd.gz"

machine() { # NUMBER
    timeout 600 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -m 1200 -nographic -no-reboot \
        -kernel "$kernel" -initrd "$work/initrd.gz" -append "console=ttyS0 quiet machine=$1" \
        -virtfs local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap \
        -netdev socket,id=net,mcast=230.0.0.1:12345,localaddr=127.0.0.1 \
        -device "virtio-net-pci,netdev=net,mac=52:54:00:00:00:0$1" \
        -monitor none -serial "file:$work/console.$1" -serial "file:$work/events.$1" </dev/null >"$work/qemu.$1" 2>&1
}
for number in 1 2 3; do machine $number & done
wait
"$here/../../.venv/bin/python" "$here/contend.py" check "$work/events.1" || {
    cat -v "$work"/events.1 "$work"/console.*
    exit 1
}
