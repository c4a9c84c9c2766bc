//! Linux boots, works and powers off.

use std::time::Duration;

use anyhow::Result;

use crate::godwit::Godwit;
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::host_tsc_parameter;

/// See its `about`.
pub(super) const LINUX: Scenario = Scenario {
    name: "boot-linux",
    about: "Debian's kernel boots by PVH and from its bzImage, with 1 and 2 vCPUs, works, and powers off",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(180),
    run: linux,
};

fn linux(context: &Context) -> Result<()> {
    for (name, kernel, vcpus) in [("pvh", "vmlinux", "1"), ("bzimage", "vmlinuz", "2")] {
        let image = |file: &str| context.images.join(file).display().to_string();
        let (kernel, initramfs) = (image(kernel), image("initramfs"));
        let tsc = host_tsc_parameter();
        let words = format!(
            "console=ttyS0 quiet panic=1 {tsc} godwit.run=\"verifier --memory 4M --seconds 2\" godwit.poweroff"
        );
        let machine = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", &words, "--memory=256M"];
        let godwit = Godwit::run(context, name, &[&machine[..], &["--vcpus", vcpus]].concat())?;
        let mut console = godwit.console()?;
        console.expect("\"type\":\"report\",\"ok\":true", Duration::from_secs(90))?;
        godwit.finish(Duration::from_secs(60))?.expect(0, "The guest powered off")?;
    }
    Ok(())
}
