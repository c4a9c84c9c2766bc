# The devices of the emulator that runs a lab, as Kconfig symbols of QEMU (configs/devices/x86_64-softmmu). The q35
# machine selects what it cannot do without, the serial port among it.
CONFIG_Q35=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_SERIAL=y
