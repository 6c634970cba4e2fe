# The first process of a virtual machine of run.sh: machine 1 is the NFS server, 2 and 3 are clients.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
here=$(cd "$(dirname "$0")" && pwd)
me=$(tr ' ' '\n' </proc/cmdline | sed -n 's/^machine=//p')
for folder in /run /var/lib/nfs /var/tmp /mnt /srv; do mount -t tmpfs none $folder; done
modprobe virtio_net
ip link set lo up
device=$(basename "$(ls -d /sys/class/net/e*)")
ip link set "$device" up
ip address add "10.0.0.$me/24" dev "$device"
hostname "machine$me"

serve() {
    mkdir -p /srv/share /var/lib/nfs/v4recovery
    touch /var/lib/nfs/{etab,rmtab,xtab,state}
    modprobe nfsd
    mount -t nfsd nfsd /proc/fs/nfsd
    echo 15 >/proc/fs/nfsd/nfsv4gracetime # seconds after which a lost machine's locks are freed
    echo 15 >/proc/fs/nfsd/nfsv4leasetime
    exportfs -o rw,fsid=0,no_root_squash,no_subtree_check,insecure '10.0.0.0/24:/srv/share'
    rpc.mountd -N 3
    rpc.nfsd -N 3 -V 4.2 8
    until [ -e /srv/share/over ]; do sleep 1; done
    stty -F /dev/ttyS1 raw
    (cd /srv/share && grep -H . ./*.log) >/dev/ttyS1
}

barrier() { # NAME: wait until both clients are here
    touch "$1.$me"
    until [ -e "$1.2" ] && [ -e "$1.3" ]; do
        sleep 1
        touch ".refresh.$me" && rm ".refresh.$me" # invalidates the client's cached directory
    done
}

phase() { # NAME SECONDS: four processes on each client build; SECONDS for an artifact
    for number in 1 2 3 4; do
        "$here/../../.venv/bin/python" "$here/contend.py" build "$1" "$me$number" "$2" &
    done
    until [ "$(ls "$1".ready."$me"* 2>/dev/null | wc -l)" = 4 ]; do sleep 1; done
    barrier "$1.all"
    if [ "$1" != undisturbed ] && [ "$me" = 2 ]; then barrier "$1.started"; fi # machine 3 is first
    touch "$1.go.$me"
    if [ "$1" != undisturbed ] && [ "$me" = 3 ]; then
        until builder=$(grep -l started "$1".machine3.*.log 2>/dev/null | head -1) && [ "$builder" ]; do
            sleep 0.1
        done
        barrier "$1.started"
        sleep 1.5 # until machine 2 waits for the lock
        if [ "$1" = lost ]; then echo b >/proc/sysrq-trigger; fi # reboot: the machine is gone
        kill -9 "$(echo "$builder" | cut -d. -f4)"
    fi
    wait
}

if [ "$me" = 1 ]; then
    serve
else
    modprobe nfsv4
    until mount.nfs4 10.0.0.1:/ /mnt -o vers=4.2,hard; do sleep 1; done
    cd /mnt
    barrier mounted
    phase undisturbed 3
    barrier undisturbed.over
    phase killed 6
    barrier killed.over
    phase lost 12
    touch over
fi
echo o >/proc/sysrq-trigger
sleep 10
