#!/bin/sh
# busybox's acpid runs this when the ACPI power button is pressed.
echo "godwit-guest: power button" >/dev/console
poweroff -f
