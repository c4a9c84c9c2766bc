//! What a run has measured so far, one cell a line: a run of hours that is cut off can go on.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};
use godwit_tests::bench::migrate::Cell;
use godwit_tests::bench::migrate::cell::Heat;

const NAME: &str = "migrate.jsonl";

/// The journal of a folder of results.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// What runs before have measured.
    known: Vec<Cell>,
}

impl Journal {
    /// Opens the one of `folder`, which is made if it is not there. What it holds is forgotten unless the run is to go on with
    /// it.
    pub(super) fn open(folder: &Path, resume: bool) -> Result<Self> {
        let path = folder.join(NAME);
        let opened = || -> Result<Self> {
            fs::create_dir_all(folder)?;
            let text = match fs::read_to_string(&path) {
                Ok(text) if resume => text,
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
                _ => String::new(),
            };
            // A run may have been cut off in the middle of a line.
            let known: Vec<Cell> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
            write_all(&mut file, &known)?;
            Ok(Self { file, known })
        };
        opened().with_context(|| format!("Cannot keep a journal in {}", path.display()))
    }

    /// The cells of a heat, if a run before has measured all of them with as many turns.
    pub(super) fn cells_of(&self, heat: &Heat) -> Option<Vec<Cell>> {
        let cell_of = |contender: String| {
            let is_it = |cell: &&Cell| {
                let whole = cell.why.is_none() && cell.n == heat.runs;
                let guest = cell.guest == heat.guest.name() && cell.contender == contender;
                whole && guest && (cell.part, cell.link) == (heat.part, heat.link)
            };
            self.known.iter().find(is_it).cloned()
        };
        heat.contenders.iter().map(|contender| cell_of(contender.name())).collect()
    }

    /// Adds what was measured.
    pub(super) fn add(&mut self, cells: &[Cell]) -> Result<()> {
        write_all(&mut self.file, cells).context("Cannot go on with the journal")
    }
}

fn write_all(file: &mut File, cells: &[Cell]) -> Result<()> {
    for cell in cells {
        file.write_all(format!("{}\n", serde_json::to_string(cell)?).as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use godwit_tests::bench::migrate::plan;

    use super::*;

    fn cells(heat: &Heat) -> Vec<Cell> {
        let cell = |contender: String| Cell {
            part: heat.part,
            link: heat.link,
            guest: heat.guest.name(),
            contender,
            version: "v".to_owned(),
            machine: "m".to_owned(),
            n: heat.runs,
            figures: BTreeMap::new(),
            why: None,
        };
        heat.contenders.iter().map(|contender| cell(contender.name())).collect()
    }

    #[test]
    fn a_run_goes_on_after_what_was_measured_whole() {
        let folder = tempfile::tempdir().unwrap();
        let [first, second, third]: [Heat; 3] = plan::heats(true)[..3].to_vec().try_into().unwrap();
        let mut failed = cells(&second);
        failed[0].why = Some("no reason".to_owned());
        let mut journal = Journal::open(folder.path(), false).unwrap();
        journal.add(&cells(&first)).unwrap();
        journal.add(&failed).unwrap();
        journal.file.write_all(b"{\"part\":\"co").unwrap();
        let mut journal = Journal::open(folder.path(), true).unwrap();
        assert_eq!(journal.cells_of(&first), Some(cells(&first)));
        assert_eq!((journal.cells_of(&second), journal.cells_of(&third)), (None, None));
        assert_eq!(journal.cells_of(&Heat { runs: first.runs + 1, ..first.clone() }), None);
        journal.add(&cells(&third)).unwrap();
        let journal = Journal::open(folder.path(), true).unwrap();
        assert!(journal.cells_of(&first).is_some() && journal.cells_of(&third).is_some());
        let journal = Journal::open(folder.path(), false).unwrap();
        assert_eq!(journal.cells_of(&first), None);
    }
}
