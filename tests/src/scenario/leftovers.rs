//! What a scenario left behind: processes, network interfaces and namespaces, sockets, temporary files.
//!
//! The runner takes a [`Census`] before each scenario and asks for the difference afterwards. Processes need none: the
//! runner adopts every orphan below it, so whatever still descends from it was left by the scenario.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// How long things that are on their way out may take to be gone.
const SETTLE: Duration = Duration::from_millis(500);

/// How long killed processes may take to be gone; one that hangs in the kernel cannot be waited for forever.
const KILL_WAIT: Duration = Duration::from_secs(10);

/// Folders of the machine in which the names of new entries are compared: everything in the first ones, only names that
/// begin with `godwit` in the last ones, which belong to everybody.
const WHOLE: [&str; 2] = ["/sys/class/net", "/run/netns"];
const OURS: [&str; 3] = ["/tmp", "/run", "/dev/shm"];

/// What was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Census(BTreeSet<String>);

impl Census {
    /// Looks at the machine.
    pub(super) fn take() -> Self {
        let whole = WHOLE.iter().flat_map(|folder| entries(folder));
        let ours = OURS.iter().flat_map(|folder| entries(folder).filter(|path| is_ours(path)));
        Self(whole.chain(ours).collect())
    }
}

fn entries(folder: &str) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().to_string_lossy().into_owned())
}

fn is_ours(path: &str) -> bool {
    // Folders of the harness itself, of this run and of others beside it, are not the scenario's.
    let name = path.rsplit('/').next().unwrap_or_default();
    name.starts_with("godwit") && !name.starts_with("godwit-lab-") && !name.starts_with("godwit-scenario-")
}

/// Kills what still runs below this process, and lists in words all that was left, in `work` and on the machine.
pub(super) fn clear(before: &Census, work: &Path) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    let found = || {
        let new = Census::take().0.difference(&before.0).cloned().collect::<Vec<_>>();
        [processes(), new, files(work)].concat()
    };
    let mut left = found();
    while !left.is_empty() && Instant::now() < deadline {
        sleep(Duration::from_millis(20));
        left = found();
    }
    kill_descendants();
    left
}

/// Kills and reaps everything that descends from this process.
pub(crate) fn kill_descendants() {
    let deadline = Instant::now() + KILL_WAIT;
    loop {
        let descendants = descendants();
        if descendants.is_empty() || Instant::now() > deadline {
            return;
        }
        for descendant in descendants {
            // It may have ended by itself since; then there is only something to reap.
            let _: rustix::io::Result<()> = kill_process(descendant.pid, Signal::KILL);
            reap(descendant.pid);
        }
        sleep(Duration::from_millis(2));
    }
}

fn processes() -> Vec<String> {
    let mut lines = Vec::new();
    for descendant in descendants() {
        if descendant.zombie {
            reap(descendant.pid);
        } else {
            lines.push(format!("process {} ({})", descendant.pid.as_raw_pid(), descendant.name));
        }
    }
    lines
}

/// Collects an ended child; one that is not ours, or not ended, stays for another time.
fn reap(pid: Pid) {
    let _: rustix::io::Result<_> = waitpid(Some(pid), WaitOptions::NOHANG);
}

fn files(work: &Path) -> Vec<String> {
    let temporary = entries(&temporary_folder(work).to_string_lossy()).collect::<Vec<_>>();
    let mut sockets = Vec::new();
    find_sockets(work, &mut sockets);
    [temporary, sockets].concat()
}

/// Where the scenario's process and all below it put temporary files.
pub(super) fn temporary_folder(work: &Path) -> std::path::PathBuf {
    work.join("tmp")
}

fn find_sockets(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => find_sockets(&entry.path(), found),
            Ok(kind) if kind.is_socket() => found.push(format!("socket {}", entry.path().display())),
            _ => {}
        }
    }
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    parent: i32,
    name: String,
    zombie: bool,
}

/// Every process below this one.
fn descendants() -> Vec<Process> {
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let folders = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = folders.filter_map(|entry| parse_stat(&fs::read_to_string(entry.path().join("stat")).ok()?));
    let mut others: Vec<Process> = all.collect();
    let (mut found, mut parents) = (Vec::new(), vec![own]);
    while let Some(parent) = parents.pop() {
        let (children, rest) = others.into_iter().partition(|process| process.parent == parent);
        let children: Vec<Process> = children;
        others = rest;
        parents.extend(children.iter().map(|child| child.pid.as_raw_pid()));
        found.extend(children);
    }
    found
}

/// Reads `/proc/PID/stat`: number, name in parentheses (which may hold anything), state, parent (proc(5)).
fn parse_stat(stat: &str) -> Option<Process> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let zombie = fields.next()? == "Z";
    let pid = Pid::from_raw(pid.parse().ok()?)?;
    Some(Process { pid, parent: fields.next()?.parse().ok()?, name: name.to_owned(), zombie })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_process_name_is_read() {
        let process = parse_stat("42 (a) Z (b) c) S 7 42 42 0").unwrap();
        assert_eq!((process.pid.as_raw_pid(), process.parent, process.zombie), (42, 7, false));
        assert_eq!(process.name, "a) Z (b) c");
        assert!(parse_stat("nonsense").is_none());
    }

    #[test]
    fn sockets_and_temporary_files_are_found() {
        let work = tempfile::tempdir().unwrap();
        fs::create_dir_all(temporary_folder(work.path())).unwrap();
        fs::write(work.path().join("log"), "may stay").unwrap();
        assert!(files(work.path()).is_empty());
        fs::write(temporary_folder(work.path()).join("memory"), "").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(work.path().join("api.sock")).unwrap();
        let found = files(work.path());
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].ends_with("tmp/memory") && found[1].ends_with("api.sock"), "{found:?}");
    }

    #[test]
    fn a_new_file_of_ours_is_noticed() {
        let before = Census::take();
        let file = tempfile::Builder::new().prefix("godwit-leftover-").tempfile().unwrap();
        let after = Census::take();
        let new: Vec<_> = after.0.difference(&before.0).filter(|path| path.contains("leftover")).collect();
        assert_eq!(new, [&file.path().to_string_lossy().into_owned()]);
        assert!(!is_ours("/tmp/godwit-lab-x") && !is_ours("/tmp/else"));
    }
}
