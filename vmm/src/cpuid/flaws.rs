//! IA32_ARCH_CAPABILITIES: which flaws of processors a guest's kernel need not work around, as it was told when it started
//! (Intel SDM volume 4, table 2-2; Linux `arch/x86/include/asm/msr-index.h`).

/// The register.
pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;

/// Bits that tell of a flaw: predictors that use the return stack's alternatives. All others tell of its absence, or of a
/// remedy.
const FLAWS: u64 = 1 << 2 | 1 << 19;

const NAMES: &[(u32, &str)] = &[
    (0, "rdcl_no"),
    (1, "ibrs_all"),
    (2, "no rsba"),
    (3, "skip_l1dfl_vmentry"),
    (4, "ssb_no"),
    (5, "mds_no"),
    (6, "if_pschange_mc_no"),
    (7, "tsx_ctrl"),
    (8, "taa_no"),
    (13, "sbdr_ssdp_no"),
    (14, "fbsdp_no"),
    (15, "psdp_no"),
    (17, "fb_clear"),
    (19, "no rrsba"),
    (20, "bhi_no"),
    (24, "pbrsb_no"),
    (26, "gds_no"),
    (27, "rfds_no"),
    (28, "rfds_clear"),
    (62, "its_no"),
];

/// What a guest that was told `told` relies on and a host with `here` does not give.
pub(super) fn missing(told: u64, here: u64) -> impl Iterator<Item = String> {
    let lost = (told & !here & !FLAWS) | (here & !told & FLAWS);
    (0..u64::BITS).filter(move |bit| lost & 1 << bit != 0).map(|bit| {
        let name = NAMES.iter().find(|(known, _)| *known == bit).map(|(_, name)| (*name).to_owned());
        name.unwrap_or_else(|| format!("bit {bit} of IA32_ARCH_CAPABILITIES"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(told: u64, here: u64) -> Vec<String> {
        missing(told, here).collect()
    }

    #[test]
    fn absent_flaws_must_be_absent_here() {
        assert_eq!(lost(0b10_0001, 0b10_0001), [""; 0]);
        assert_eq!(lost(0b10_0001, 0b1110_0001), [""; 0], "a better host");
        assert_eq!(lost(0b10_0001, 0b1), ["mds_no"]);
        assert_eq!(lost(1 << 62 | 1 << 40, 0), ["bit 40 of IA32_ARCH_CAPABILITIES", "its_no"]);
    }

    #[test]
    fn a_flaw_must_not_be_news() {
        assert_eq!(lost(0, FLAWS), ["no rsba", "no rrsba"]);
        assert_eq!(lost(FLAWS, 0), [""; 0]);
    }
}
