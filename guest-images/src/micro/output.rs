//! What the micro guest prints, as values.
//!
//! Called by tests and benches. A line is `WORD NAME=NUMBER …`; whatever does not read as one is [`Line::Other`], since
//! a VMM may print between the guest's lines.

/// One line of the micro guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// `micro`: the guest runs.
    Started,
    /// `ready …`: it has parsed its command line and begins its work.
    Ready {
        /// The frequency of the TSC that it computes with.
        tsc_khz: u64,
        /// Where the working set begins.
        base: u64,
        /// Its size in pages.
        pages: u64,
    },
    /// `tick N …`
    Tick {
        /// Number of the tick, from 0 on.
        sequence: u64,
        /// What happened until then.
        progress: Progress,
    },
    /// `verified …`: the answer to `v`.
    Verified {
        /// Pages and clock readings that were wrong, since the start.
        bad: u64,
        /// Completed walks through the working set.
        passes: u64,
        /// What happened until then.
        progress: Progress,
    },
    /// `end …`: the answer to `q`, and the last line.
    End {
        /// As in [`Line::Verified`].
        bad: u64,
        /// Completed walks through the working set.
        passes: u64,
        /// What happened until then.
        progress: Progress,
    },
    /// `BAD …`: a page, the initrd or the clock was wrong.
    Bad(String),
    /// `refused: …`: the command line asks for something impossible.
    Refused(String),
    /// Something else.
    Other(String),
}

/// What the guest knows about itself at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Microseconds since its start, by its TSC.
    pub microseconds: u64,
    /// Pages written since its start.
    pub pages: u64,
    /// The longest time between two looks at the clock, in microseconds: a pause that the TSC went through.
    pub longest_gap_microseconds: u64,
}

impl Line {
    /// Reads a line, with or without its end.
    pub fn parse(line: &str) -> Self {
        let line = line.trim_end();
        Self::known(line).unwrap_or_else(|| Self::Other(line.to_owned()))
    }

    fn known(line: &str) -> Option<Self> {
        if line == "micro" {
            return Some(Self::Started);
        }
        if let Some(refusal) = line.strip_prefix("refused: ") {
            return Some(Self::Refused(refusal.to_owned()));
        }
        let (word, rest) = line.split_once(' ')?;
        match word {
            "BAD" => Some(Self::Bad(rest.to_owned())),
            "ready" => Some(Self::Ready {
                tsc_khz: number(rest, "khz")?,
                base: number(rest, "base")?,
                pages: number(rest, "pages")?,
            }),
            "tick" => {
                let sequence = rest.split(' ').next()?.parse().ok()?;
                Some(Self::Tick { sequence, progress: progress(rest)? })
            }
            "verified" => {
                let (bad, passes) = (number(rest, "bad")?, number(rest, "passes")?);
                Some(Self::Verified { bad, passes, progress: progress(rest)? })
            }
            "end" => {
                let (bad, passes) = (number(rest, "bad")?, number(rest, "passes")?);
                Some(Self::End { bad, passes, progress: progress(rest)? })
            }
            _ => None,
        }
    }
}

fn progress(fields: &str) -> Option<Progress> {
    Some(Progress {
        microseconds: number(fields, "us")?,
        pages: number(fields, "pages")?,
        longest_gap_microseconds: number(fields, "gap_us")?,
    })
}

fn number(fields: &str, name: &str) -> Option<u64> {
    fields.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read() {
        let progress = Progress { microseconds: 5, pages: 6, longest_gap_microseconds: 7 };
        let lines = [
            ("micro\r\n", Line::Started),
            (
                "ready khz=2600000 base=16777216 pages=4096",
                Line::Ready { tsc_khz: 2_600_000, base: 1 << 24, pages: 4096 },
            ),
            ("tick 3 us=5 pages=6 gap_us=7\n", Line::Tick { sequence: 3, progress }),
            ("verified bad=1 passes=2 us=5 pages=6 gap_us=7", Line::Verified { bad: 1, passes: 2, progress }),
            ("end bad=0 passes=2 us=5 pages=6 gap_us=7", Line::End { bad: 0, passes: 2, progress }),
            ("BAD content", Line::Bad("content".to_owned())),
            ("refused: unknown pattern", Line::Refused("unknown pattern".to_owned())),
        ];
        for (text, line) in lines {
            assert_eq!(Line::parse(text), line);
        }
    }

    #[test]
    fn anything_else_is_kept_as_it_is() {
        for text in
            ["", "tick", "tick x us=1 pages=1 gap_us=1", "tick 1 us=1 pages=-1 gap_us=1", "ready", "qemu: hello"]
        {
            assert_eq!(Line::parse(text), Line::Other(text.to_owned()));
        }
    }
}
