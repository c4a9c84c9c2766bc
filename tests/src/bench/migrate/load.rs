//! What a Debian works on while it is moved, and how it tells that nothing of it was harmed.
//!
//! Each load is a systemd unit of the guest's, made of nothing but Debian's packages, whose output is a file. All three check
//! themselves: memcaslap a tenth of the values that it gets back, PostgreSQL by the sums of its accounts, stress-ng all
//! that it wrote. The commands are for `super::guest_shell`: they fail where something is wrong, and print what.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What the guest works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// memcached, full with 16 MiB of values of 1000 bytes. Nine of ten operations are a get and one is a set, as fast as one
    /// memcaslap can.
    Memcached,
    /// PostgreSQL with pgbench's TPC-B-like transactions, at scale 1, of two clients.
    PostgreSql,
    /// A compiler's way with memory: a process that fills 32 MiB, works through them, holds them for a second, and is
    /// followed by one with fresh pages. Each eight bytes are alike and random, so that pages differ and can be packed.
    StressNg,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Memcached, Self::PostgreSql, Self::StressNg];

    /// Begins it, and waits until it works on all of its memory.
    pub(super) fn begin(self) -> String {
        let (before, user, command, works) = match self {
            Self::Memcached => (
                "sed -i 's/^-m .*/-m 16/' /etc/memcached.conf && systemctl restart memcached\n\
                 printf 'key\\n16 16 1\\nvalue\\n1000 1000 1\\ncmd\\n0 1.0\\n' >/run/sets\n\
                 memcaslap --servers=127.0.0.1:11211 --threads=1 --concurrency=4 --win_size=8k --cfg_cmd=/run/sets \
                 --execute_number=16000",
                "root",
                // What it has seen it tells when a run has ended.
                "while memcaslap --servers=127.0.0.1:11211 --threads=1 --concurrency=4 --win_size=2k \
                 --fixed_size=1000 --verify=0.1 --time=30s; do :; done; exit 1",
                "memcstat --servers=127.0.0.1 | grep -q 'cmd_get: [1-9]'",
            ),
            Self::PostgreSql => (
                "until pg_isready --quiet; do sleep 1; done\n\
                 su postgres -c '/usr/lib/postgresql/*/bin/pgbench --initialize --quiet --scale=1' 2>&1",
                "postgres",
                "exec /usr/lib/postgresql/*/bin/pgbench --client=2 --time=86400 --progress=2 --no-vacuum",
                "grep -q progress: /run/load.log",
            ),
            Self::StressNg => (
                "",
                "root",
                "exec stress-ng --vm 1 --vm-bytes 32M --vm-method rand-set --vm-hang 1 --verify",
                "pgrep -f stress-ng-vm >/dev/null",
            ),
        };
        format!(
            "{before}\nsystemd-run --quiet --unit=load --property=User={user} \
             --property=StandardOutput=append:/run/load.log --property=StandardError=append:/run/load.log \
             sh -c '{command}'\nuntil {works}; do sleep 1; systemctl is-active --quiet load || break; done\n{}",
            self.healthy()
        )
    }

    /// Whether it goes on and has seen nothing wrong.
    pub(super) fn healthy(self) -> String {
        let complaint = self.complaint();
        format!("systemctl is-active load && ! grep -E '{complaint}' /run/load.log")
    }

    /// Ends it, and looks at everything.
    pub(super) fn end(self) -> String {
        let (last, complaint, proof) = (self.last_look(), self.complaint(), self.proof());
        let stop = "systemctl is-active --quiet load && systemctl stop load";
        format!("{last}\n{stop} && ! grep -E '{complaint}' /run/load.log && {proof}")
    }

    /// Waits until it has looked at all that the last move may have harmed.
    fn last_look(self) -> &'static str {
        match self {
            // It looks back when a run ends: at that of the last move, and at one that began after it.
            Self::Memcached => {
                "looks() { grep -c verify_failed /run/load.log; }\nenough=$(($(looks) + 2))\n\
                 while systemctl is-active --quiet load && [ $(looks) -lt $enough ]; do sleep 1; done"
            }
            Self::PostgreSql | Self::StressNg => ":",
        }
    }

    /// What a line of its output has that is no good news.
    fn complaint(self) -> &'static str {
        match self {
            Self::Memcached => "verify_failed: [1-9]|[Ee]rror|[Ff]ail(ed|ure) to",
            Self::PostgreSql => " [1-9][0-9]* failed|aborted|ERROR|FATAL|PANIC",
            Self::StressNg => "stress-ng: (fail|error|warn):",
        }
    }

    /// A command that fails where something was lost.
    fn proof(self) -> &'static str {
        match self {
            // Without this line no run has been looked back at.
            Self::Memcached => "grep -q 'verify_failed: 0' /run/load.log && memcping --servers=127.0.0.1",
            // Each transaction adds the same to an account and to the history.
            Self::PostgreSql => {
                "su postgres -c 'psql -Atc \"SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history) \
                 FROM pgbench_accounts\"' | grep -x t"
            }
            // Where it has found a wrong byte, its status says so when it is stopped.
            Self::StressNg => "! systemctl is-failed load",
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memcached => "memcached",
            Self::PostgreSql => "PostgreSQL",
            Self::StressNg => "stress-ng",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn complains(load: Load, output: &str) -> bool {
        let script = format!("printf '%s\n' \"$1\" | grep -E '{}'", load.complaint());
        Command::new("sh").args(["-c", &script, "sh", output]).output().unwrap().status.success()
    }

    #[test]
    fn good_news_is_no_complaint() {
        let cases = [
            (Load::Memcached, "get_misses: 0\nverify_misses: 12\nverify_failed: 0", "verify_failed: 3"),
            (
                Load::PostgreSql,
                "progress: 2.0 s, 21.5 tps, lat 91.1 ms stddev 20.4, 0 failed",
                "progress: 4.0 s, 0.0 tps, lat 0.0 ms stddev 0.0, 1 failed",
            ),
            (Load::PostgreSql, "starting vacuum...end.", "pgbench: error: client 1 aborted in command 4"),
            (
                Load::StressNg,
                "stress-ng: info:  [411] dispatching hogs: 1 vm",
                "stress-ng: fail:  [413] vm: detected 8 bit errors while stressing memory",
            ),
        ];
        for (load, good, bad) in cases {
            assert!(!complains(load, good), "{load}: {good}");
            assert!(complains(load, bad), "{load}: {bad}");
        }
    }

    #[test]
    fn the_commands_are_those_of_a_shell() {
        for load in Load::ALL {
            for command in [load.begin(), load.healthy(), load.end()] {
                let parsed = Command::new("sh").args(["-n", "-c", &command]).status().unwrap();
                assert!(parsed.success(), "{command}");
            }
        }
    }
}
