#!/bin/sh
# The first process of a guest. initramfs/mod.rs lists the kernel parameters that it obeys.
# busybox's shell finds its own applets without any links in PATH, once it sees itself as /proc/self/exe.

/bin/busybox mount -t proc proc /proc
read -r uptime _ </proc/uptime
echo "godwit-guest: init $uptime"
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
export HOME=/ TERM=vt100 PATH=/bin

run='' root='' net='' poweroff=''
# The kernel leaves the quotes in: godwit.run="verifier --tick-ms 10".
eval "set -- $(cat /proc/cmdline)"
for parameter; do
    value=${parameter#*=}
    case $parameter in
    godwit.run=*) run=$value ;;
    godwit.root=*) root=$value ;;
    godwit.net=*) net=$value ;;
    godwit.poweroff) poweroff=yes ;;
    esac
done

for module in /modules/*; do
    insmod "$module" || echo "godwit-guest: cannot load $module"
done

# Devices are probed in the background: wait for one that the parameters promise, for 10 s.
await() {
    for _ in $(seq 200); do
        [ -e "$1" ] && return 0
        usleep 50000
    done
    echo "godwit-guest: $1 did not appear"
    return 1
}

if [ -n "$root" ]; then
    await "$root" && mount -t ext4 "$root" /root && {
        mount -t tmpfs -o mode=755 run /run
        mkdir -p /run/godwit /run/systemd/network
        cp /bin/verifier /run/godwit/verifier
        if [ -n "$net" ]; then
            printf '[Match]\nDriver=virtio_net\n[Network]\nAddress=%s\n' "${net%,*}" >/run/systemd/network/10-godwit.network
            case $net in *,*) echo "Gateway=${net#*,}" >>/run/systemd/network/10-godwit.network ;; esac
        fi
        umount /dev/pts
        for place in sys dev run proc; do mount --move "/$place" "/root/$place"; done
        exec /bin/busybox switch_root /root /sbin/init
    }
    echo "godwit-guest: no root on $root"
fi

ip link set lo up
if [ -n "$net" ] && await /sys/class/net/eth0; then
    ip address add "${net%,*}" dev eth0
    ip link set eth0 up
    case $net in *,*) ip route add default via "${net#*,}" ;; esac
fi
acpid -l /dev/null

if [ -n "$run" ]; then
    # Raw: what the host writes arrives as it was written and is not echoed, and lines end as the program ended them.
    stty -F /dev/ttyS0 raw -echo
    setsid sh -c "$run" <>/dev/ttyS0 >&0 2>&1
    echo "godwit-guest: exit $?"
    [ -n "$poweroff" ] && poweroff -f
    stty -F /dev/ttyS0 sane
fi
while true; do
    setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1 || sleep 1
done
