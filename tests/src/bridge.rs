//! A bridge on this host with taps for guests, so that a guest that is moved between taps keeps its place on the wire.
//!
//! Made by scenarios, inside a lab or on a host, under names of their own; everything goes when it is dropped.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where iproute2 has its `ip`; busybox has another one of that name.
const IP: &str = "/usr/sbin/ip";

/// A bridge with an address and two taps.
#[derive(Debug)]
pub struct Bridge {
    name: String,
}

impl Bridge {
    /// Makes the bridge `name` with an address such as `10.78.0.1/24`, and its taps. Names are at most 12 bytes long.
    pub fn make(name: &str, address: &str) -> Result<Self> {
        let bridge = Self { name: name.to_owned() };
        ip(&["link", "add", name, "type", "bridge", "forward_delay", "0"])?;
        ip(&["address", "add", address, "dev", name])?;
        ip(&["link", "set", name, "up"])?;
        for index in 0..2 {
            let tap = bridge.tap(index);
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap", "vnet_hdr"])?;
            ip(&["link", "set", &tap, "master", name, "up"])?;
        }
        Ok(bridge)
    }

    /// The name of a tap. Guests that are moved alternate between the two.
    pub fn tap(&self, index: usize) -> String {
        format!("{}t{}", self.name, index % 2)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for device in [self.tap(0), self.tap(1), self.name.clone()] {
            // What was not made cannot be deleted, and is not there either.
            let _ = ip(&["link", "delete", &device]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new(IP).args(arguments).output().context("Cannot run iproute2's ip")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {} failed: {words}", arguments.join(" "));
    Ok(())
}
