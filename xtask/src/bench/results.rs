//! What was measured as files: all cells in CSV, tables in Markdown, and plots. No dates, so that two runs compare.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use godwit_tests::bench::Figure;
use godwit_tests::bench::migrate::Cell;
use godwit_tests::bench::migrate::cell::{Link, Part};

use super::plot::{Chart, draw};
use super::{Row, promise_table, word};

/// The figures in the order of the columns, and what they are called for people.
const FIGURES: [(Figure, &str); 6] = [
    (Figure::MigrationMs, "total, ms"),
    (Figure::DowntimeMs, "downtime, ms"),
    (Figure::LinkMb, "sent, MB"),
    (Figure::CpuS, "CPU, s"),
    (Figure::RateMbS, "non-zero, MB/s"),
    (Figure::MemoryMib, "memory, MiB"),
];

/// What is plotted where the figures tell something beside each other.
const PLOTTED: [(Part, Figure); 4] = [
    (Part::AgainstQemu, Figure::MigrationMs),
    (Part::AgainstQemu, Figure::DowntimeMs),
    (Part::Codecs, Figure::MigrationMs),
    (Part::RealGuests, Figure::MigrationMs),
];

/// What the figures of real guests are of.
const REAL_GUESTS: &str = "\
Each guest is booted once, with one vCPU, and moved there and back between two hosts in one nested lab, a turn each move, \
while its load goes on: memcached full with 16 MiB of values of 1000 bytes under memcaslap, nine of ten operations a get; \
PostgreSQL under pgbench with two clients; stress-ng filling 32 MiB of fresh pages, working through them and holding them \
for a second, again and again, which is a compiler's way with memory. After each move the load must be well, after all of \
them its data right. The processor time is Godwit's own account. The link is slow because a lab's processors may be \
emulated: such ones pack 15 to 30 MB/s, and outrun 100 Mbit/s as real ones do 1 Gbit/s, while on a faster link packing would \
take as long as it saves. What the figures tell is how contenders compare, not how fast a host is.";

/// Writes `migrate.csv`, `migrate.md` and `migrate-*.svg` into a folder, which is made if it is not there.
pub(super) fn write(folder: &Path, cells: &[Cell], rows: &[Row]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
    };
    put("migrate.csv", &csv(cells))?;
    let mut plots = Vec::new();
    for (part, link) in groups(cells) {
        for (_, figure) in PLOTTED.into_iter().filter(|(plotted, _)| *plotted == part) {
            let chart = chart(cells, part, link, figure);
            let name = format!("migrate-{}-{link}-{}.svg", word(&part), word(&figure));
            if let Some(svg) = draw(&chart)? {
                put(&name, &svg)?;
                plots.push((part, link, name));
            }
        }
    }
    put("migrate.md", &markdown(cells, rows, &plots))
}

/// Questions and links in order.
fn groups(cells: &[Cell]) -> BTreeSet<(Part, Link)> {
    cells.iter().map(|cell| (cell.part, cell.link)).collect()
}

fn csv(cells: &[Cell]) -> String {
    let mut text = "part,link,guest,contender,version,machine,n".to_owned();
    for (figure, _) in FIGURES {
        let name = word(&figure);
        text += &format!(",{name} median,{name} min,{name} max");
    }
    text += ",why\n";
    for cell in cells {
        let Cell { part, link, guest, contender, version, machine, n, figures, why } = cell;
        let words = [word(part), link.to_string(), guest.clone(), contender.clone(), version.clone(), machine.clone()];
        let mut fields: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        fields.push(n.to_string());
        for (figure, _) in FIGURES {
            let summary = figures.get(&figure);
            let values =
                summary.map(|summary| [summary.median, summary.min, summary.max].map(|value| value.to_string()));
            fields.extend(values.unwrap_or_default());
        }
        fields.push(quoted(why.as_deref().unwrap_or_default()));
        text += &fields.join(",");
        text.push('\n');
    }
    text
}

/// A field of CSV (RFC 4180, section 2).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

fn markdown(cells: &[Cell], rows: &[Row], plots: &[(Part, Link, String)]) -> String {
    let unique = |of: fn(&Cell) -> &str| cells.iter().map(of).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>();
    let mut text = format!(
        "# Migrations\n\nMade by `cargo xtask bench migrate --results DIR` on {}, with {}.\n\
         Medians of alternating turns. Total time and bytes are each VMM's own account, the downtime is the longest gap in the \
         guest's ticks of 1 ms, or 20 ms in the lab, the processor time is that of both ends without vCPUs. All guests are \
         micro guests but those in the lab. Those that write nothing run at idle priority: they look at their clock where \
         others would halt, and their ticks may be late for it.\n",
        unique(|cell| &cell.machine).join("; "),
        unique(|cell| &cell.version).join(", "),
    );
    text += &format!("\n## Promises\n\n```\n{}```\n", promise_table(rows));
    for (part, link) in groups(cells) {
        let title = match part {
            Part::AgainstQemu => "Beside QEMU",
            Part::Codecs => "Codecs",
            Part::Distance => "Over a long way",
            Part::EngineMemory => "Memory of the engine",
            Part::HandOver => "Memory handed over within the host",
            Part::RealGuests => "A Debian under load, in the nested lab",
        };
        let _ = writeln!(text, "\n## {title}, {link}\n");
        if part == Part::RealGuests {
            let _ = writeln!(text, "{REAL_GUESTS}\n");
        }
        for (_, _, name) in plots.iter().filter(|plot| (plot.0, plot.1) == (part, link)) {
            let _ = writeln!(text, "![{name}]({name})\n");
        }
        text += "| guest | contender | turns |";
        text += &FIGURES.map(|(_, head)| format!(" {head} |")).concat();
        text += "\n| --- | --- | --: |";
        text += &FIGURES.map(|_| " --: |").concat();
        text.push('\n');
        for cell in cells.iter().filter(|cell| (cell.part, cell.link) == (part, link)) {
            let value = |figure| cell.median(figure).map_or_else(String::new, |value| format!("{value:.2}"));
            let numbers = FIGURES.map(|(figure, _)| format!(" {} |", value(figure))).concat();
            let Cell { guest, contender, n, .. } = cell;
            let _ = writeln!(text, "| {guest} | {contender} | {n} |{numbers}");
        }
        for cell in cells.iter().filter(|cell| (cell.part, cell.link) == (part, link)) {
            if let Some(why) = &cell.why {
                let _ = writeln!(text, "\nNot measured: {}, {}: {why}", cell.guest, cell.contender);
            }
        }
    }
    text
}

fn chart(cells: &[Cell], part: Part, link: Link, figure: Figure) -> Chart {
    let here = || cells.iter().filter(|cell| (cell.part, cell.link) == (part, link));
    let in_order = |of: fn(&Cell) -> &str| {
        let mut names: Vec<String> = Vec::new();
        for cell in here().filter(|cell| cell.figures.contains_key(&figure)) {
            if !names.iter().any(|name| name == of(cell)) {
                names.push(of(cell).to_owned());
            }
        }
        names
    };
    let (guests, contenders) = (in_order(|cell| &cell.guest), in_order(|cell| &cell.contender));
    let value = |guest: &str, contender: &str| {
        here().find(|cell| cell.guest == guest && cell.contender == contender).and_then(|cell| cell.median(figure))
    };
    let series = contenders.into_iter().map(|contender| {
        let values = guests.iter().map(|guest| value(guest, &contender)).collect();
        (contender, values)
    });
    let head = FIGURES.into_iter().find(|(known, _)| *known == figure).map_or("", |(_, head)| head);
    let machine = here().next().map_or("", |cell| cell.machine.as_str());
    Chart {
        title: format!("{}, {link}: {head}", word(&part)),
        subtitle: machine.to_owned(),
        series: series.collect(),
        groups: guests,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use godwit_tests::bench::Summary;

    use super::*;

    fn cells() -> Vec<Cell> {
        let cell = |contender: &str, value: Option<f64>| Cell {
            part: Part::Codecs,
            link: Link::Gigabit,
            guest: "idle, 1 MiB".to_owned(),
            contender: contender.to_owned(),
            version: "godwit 0.1.0".to_owned(),
            machine: "a \"fast\" one".to_owned(),
            n: 1,
            figures: value
                .map(|value| BTreeMap::from([(Figure::MigrationMs, Summary::of(vec![value]).unwrap())]))
                .unwrap_or_default(),
            why: value.is_none().then(|| "no such codec".to_owned()),
        };
        vec![cell("godwit none", Some(1000.5)), cell("godwit zstd", None)]
    }

    #[test]
    fn csv_has_a_line_a_cell() {
        let text = csv(&cells());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        let columns = lines[0].split(',').count();
        let begin =
            "codecs,1gbit,\"idle, 1 MiB\",godwit none,godwit 0.1.0,\"a \"\"fast\"\" one\",1,1000.5,1000.5,1000.5,,";
        assert!(lines[1].starts_with(begin), "{text}");
        // A comma in the guest's name.
        assert_eq!(lines[1].split(',').count(), columns + 1, "{text}");
        assert!(lines[2].ends_with(",no such codec"), "{text}");
    }

    #[test]
    fn what_real_guests_are_is_explained() {
        let mut cells = cells();
        assert!(!markdown(&cells, &[], &[]).contains(REAL_GUESTS));
        cells[0].part = Part::RealGuests;
        let page = markdown(&cells, &[], &[]);
        assert!(
            page.contains("## A Debian under load, in the nested lab, 1gbit") && page.contains(REAL_GUESTS),
            "{page}"
        );
    }

    #[test]
    fn everything_is_written_and_the_machine_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let rows = [Row { why: Some("no such codec".to_owned()), ..Row::at_most("a promise", Some(1.0), None) }];
        write(folder.path(), &cells(), &rows).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        let page = read("migrate.md");
        for part in ["a \"fast\" one", "godwit 0.1.0", "a promise (no such codec)", "1000.50", "Not measured"] {
            assert!(page.contains(part), "{page}");
        }
        let plot = read("migrate-codecs-1gbit-migration-ms.svg");
        assert!(plot.contains("godwit none") && plot.contains("fast"), "{plot}");
        assert!(!plot.contains("zstd"), "{plot}");
    }
}
