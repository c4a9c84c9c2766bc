//! Filters as the kernel takes them: a search tree over the numbers of system calls, with the rules of seccompiler at
//! its leaves.
//!
//! seccompiler itself compares one number after the other. The kernel runs a new filter once for every call there is, to
//! learn which it can pass without asking again, so a thread would begin a quarter of a millisecond later with a list
//! than with a tree, and a guest starts five of them.

use super::calls::Permits;
use libc::{BPF_ABS, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
use seccompiler::{BpfProgram, SeccompAction, SeccompRule, sock_filter};

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// `AUDIT_ARCH_X86_64` (linux/audit.h): the machine's number, 64 bits, little endian.
const X86_64: u32 = 62 | 0x8000_0000 | 0x4000_0000;

/// What becomes of the calls whose number is at least `from`, up to the next segment.
struct Segment {
    from: u32,
    rules: Rules,
}

enum Rules {
    Unlisted,
    Listed,
    ListedIf(Vec<SeccompRule>),
}

/// The filter that answers `listed` to the calls in `calls` and `otherwise` to the rest.
pub(super) fn compile(calls: Permits, otherwise: &SeccompAction, listed: &SeccompAction) -> BpfProgram {
    let answers = Answers { otherwise: ret(otherwise), listed: ret(listed) };
    let mut program = vec![
        statement(BPF_LD | BPF_W | BPF_ABS, ARCHITECTURE),
        sock_filter { jt: 1, jf: 0, ..statement(BPF_JMP | BPF_JEQ | BPF_K, X86_64) },
        ret(&SeccompAction::KillProcess),
        statement(BPF_LD | BPF_W | BPF_ABS, NUMBER),
    ];
    program.extend(answers.tree(segments(calls)));
    program
}

/// The line of numbers, cut where the answer changes. Never empty; the first segment begins at 0.
fn segments(calls: Permits) -> Vec<Segment> {
    let mut segments = vec![Segment { from: 0, rules: Rules::Unlisted }];
    for (call, rules) in calls.into_rules() {
        let from = u32::try_from(call).expect("numbers of system calls are small and positive");
        let rules = if rules.is_empty() { Rules::Listed } else { Rules::ListedIf(rules) };
        // The last segment begins here if the call before was listed, and is to be replaced; or it goes on, or ends.
        let joins = segments.pop_if(|last| last.from == from).is_some()
            && matches!((segments.last(), &rules), (Some(Segment { rules: Rules::Listed, .. }), Rules::Listed));
        if !joins {
            segments.push(Segment { from, rules });
        }
        segments.push(Segment { from: from + 1, rules: Rules::Unlisted });
    }
    segments
}

/// The two ends of a filter.
struct Answers {
    otherwise: sock_filter,
    listed: sock_filter,
}

impl Answers {
    /// Finds the segment of the number that has been loaded. Each way through ends in an answer.
    fn tree(&self, mut segments: Vec<Segment>) -> BpfProgram {
        if segments.len() <= 1 {
            return segments.pop().map_or_else(|| vec![self.otherwise.clone()], |segment| self.leaf(segment.rules));
        }
        let upper = segments.split_off(segments.len() / 2);
        let bound = upper[0].from;
        let (lower, upper) = (self.tree(segments), self.tree(upper));
        let reaches_upper = statement(BPF_JMP | BPF_JGE | BPF_K, bound);
        // A conditional jump reaches 255 instructions; the one behind it any number.
        let mut program = match u8::try_from(lower.len()) {
            Ok(over) => vec![sock_filter { jt: over, ..reaches_upper }],
            Err(_) => vec![
                sock_filter { jf: 1, ..reaches_upper },
                statement(BPF_JMP | BPF_JA, u32::try_from(lower.len()).unwrap_or(u32::MAX)),
            ],
        };
        program.extend(lower);
        program.extend(upper);
        program
    }

    fn leaf(&self, rules: Rules) -> BpfProgram {
        match rules {
            Rules::Unlisted => vec![self.otherwise.clone()],
            Rules::Listed => vec![self.listed.clone()],
            Rules::ListedIf(rules) => {
                let mut program = Vec::new();
                for rule in rules {
                    // A rule that does not match jumps over one answer, to what comes next.
                    program.extend(BpfProgram::from(rule));
                    program.push(self.listed.clone());
                }
                program.push(self.otherwise.clone());
                program
            }
        }
    }
}

fn ret(action: &SeccompAction) -> sock_filter {
    statement(BPF_RET | BPF_K, u32::from(action.clone()))
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("codes have 16 bits"), jt: 0, jf: 0, k }
}
