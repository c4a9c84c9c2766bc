//! The program itself, on this machine, with a file as its disk.

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use verifier::net::Client;
    use verifier::report::{Line, Report};

    fn start(arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_verifier"));
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    fn lines(child: &mut Child) -> impl Iterator<Item = Line> + use<> {
        let output = BufReader::new(child.stdout.take().unwrap());
        output.lines().map(|line| Line::parse(&line.unwrap()).expect("every line is one of ours"))
    }

    fn reports(lines: impl Iterator<Item = Line>) -> impl Iterator<Item = Report> {
        lines.filter_map(|line| match line {
            Line::Report(report) => Some(*report),
            _ => None,
        })
    }

    #[test]
    fn all_modes_together_find_nothing_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut child = start(&[
            "--memory",
            "4M",
            "--cold",
            "1M",
            "--rate",
            "0",
            "--threads",
            "2",
            "--disk",
            disk.to_str().unwrap(),
            "--disk-size",
            "1M",
            "--port",
            &port.to_string(),
            "--kmsg",
            "none",
            "--tick-ms",
            "10",
        ]);
        let mut input = child.stdin.take().unwrap();
        let mut lines = lines(&mut child);
        assert!(matches!(lines.next(), Some(Line::Ready { .. })));
        let mut client = Client::connect(("127.0.0.1", port), Duration::from_secs(20)).unwrap();
        (0..10).for_each(|_| client.exchange(100).unwrap());
        let ticks: Vec<(u64, u64)> = lines
            .by_ref()
            .take(20)
            .map(|line| match line {
                Line::Tick { seq, us } => (seq, us),
                other => panic!("{other:?}"),
            })
            .collect();
        assert!(
            ticks.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1 && pair[1].1 >= pair[0].1 + 10_000),
            "{ticks:?}"
        );
        input.write_all(b"report\nfrog\rquit\n").unwrap();
        let mut rest: Vec<Line> = lines.filter(|line| !matches!(line, Line::Tick { .. })).collect();
        assert_eq!(rest.remove(1), Line::Unknown { command: "frog".to_owned() });
        let found: Vec<Report> = reports(rest.into_iter()).collect();
        assert_eq!(found.len(), 2);
        let report = found.last().unwrap();
        assert!(report.ok, "{report:?}");
        assert_eq!((report.memory.pages, report.memory.cold_pages), (1024, 256));
        assert!(report.memory.written > 1000 && report.clock.samples > 50, "{report:?}");
        assert!(report.disk.as_ref().unwrap().written >= 16, "{report:?}");
        assert_eq!(report.net.as_ref().unwrap().words, 1000);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn it_ends_by_the_clock_when_nobody_can_ask() {
        let mut child = start(&["--seconds", "1", "--memory", "64k", "--tick-ms", "0", "--kmsg", "none"]);
        drop(child.stdin.take());
        let all: Vec<Line> = lines(&mut child).collect();
        assert_eq!(all.len(), 2, "{all:?}");
        assert!(reports(all.into_iter()).next().unwrap().ok);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn a_damaged_disk_is_reported_and_is_the_exit_status() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        let mut child = start(&[
            "--memory",
            "0",
            "--disk",
            disk.to_str().unwrap(),
            "--disk-size",
            "64k",
            "--kmsg",
            "none",
            "--tick-ms",
            "0",
        ]);
        let mut input = child.stdin.take().unwrap();
        let mut found = reports(lines(&mut child));
        let mut report = || {
            input.write_all(b"report\n").unwrap();
            found.next().unwrap()
        };
        while report().disk.unwrap().written < 100 {}
        // All blocks are written by now, and the writer meets what is not its own at any of them.
        loop {
            // In place: a file that is shorter for a moment would be another fault.
            std::fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all(&[0x11; 64 << 10]).unwrap();
            let report = report();
            if !report.ok {
                assert!(report.disk.unwrap().faults.first[0].contains("0x1111111111111111"));
                break;
            }
        }
        input.write_all(b"quit\n").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let fails = |arguments: &[&str], status, text: &str| {
            let output = start(arguments).wait_with_output().unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.code() == Some(status) && error.contains(text), "{error}");
        };
        fails(&["--frog"], 2, "--frog");
        fails(&["--memory", "x"], 2, "--memory");
        fails(&["--disk", "/nonexistent/disk"], 1, "/nonexistent/disk");
        fails(&["--kmsg", "/nonexistent/log"], 1, "/nonexistent/log");
        let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        fails(&["--kmsg", "none", "--port", &port], 1, &port);
    }
}
