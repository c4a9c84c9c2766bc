//! The files that guests are given as their initrd: what their memory holds before they write to it.
//!
//! Made once by [`Contents`] and kept beside the guest images. All but the tar are the same on every machine.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::cell::Content;
use super::random::SplitMix;

/// What the tar is of.
const LIBRARIES: &str = "/usr/lib";

const PAGE: usize = 4096;
const PAGES_PER_MIB: u64 = 256;
/// Copies of each page of [`Content::Twin`].
const COPIES: u64 = 16;

/// A folder of contents.
#[derive(Debug, Clone)]
pub struct Contents {
    folder: PathBuf,
}

impl Contents {
    /// Contents in `folder`, which is made if it is not there.
    pub fn in_folder(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The file of `content` of so many MiB; made if it is not there.
    pub fn file(&self, content: Content, mib: u64) -> Result<PathBuf> {
        let name = match content {
            Content::Tar => "tar",
            Content::Random => "random",
            Content::Twin => "twin",
            Content::Colour => "colour",
            Content::Zero => "zero",
        };
        let path = self.folder.join(format!("{name}-{mib}"));
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() == mib << 20) {
            return Ok(path);
        }
        let making = || -> Result<()> {
            let mut file = BufWriter::new(File::create(&path)?);
            if content == Content::Tar {
                write_tar(&mut file, mib)?;
            } else {
                write_pages(&mut file, content, mib * PAGES_PER_MIB)?;
            }
            Ok(file.flush()?)
        };
        making().with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(path)
    }
}

fn write_tar(file: &mut impl Write, mib: u64) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--create", "--file", "-", LIBRARIES]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut tar = command.spawn().context("Cannot start tar")?;
    let output = tar.stdout.take().context("Standard output is a pipe")?;
    let copied = std::io::copy(&mut output.take(mib << 20), file);
    // It writes on into a pipe that nobody reads any more.
    tar.wait()?;
    ensure!(copied? == mib << 20, "{LIBRARIES} is smaller than {mib} MiB");
    Ok(())
}

fn write_pages(file: &mut impl Write, content: Content, pages: u64) -> Result<()> {
    let mut page = [0; PAGE];
    for number in 0..pages {
        match content {
            Content::Tar | Content::Zero => {}
            Content::Random => fill_random(&mut page, number),
            Content::Twin => fill_random(&mut page, number % (pages / COPIES)),
            // Odd, so that no colour comes twice, and never zero.
            Content::Colour => fill_words(&mut page, (number + 1).wrapping_mul(0x9e37_79b1)),
        }
        file.write_all(&page)?;
    }
    Ok(())
}

fn fill_words(page: &mut [u8; PAGE], word: u64) {
    let [a, b, c, d, ..] = word.to_le_bytes();
    page.as_chunks_mut().0.fill([a, b, c, d]);
}

fn fill_random(page: &mut [u8; PAGE], seed: u64) {
    let mut random = SplitMix(seed << 32);
    page.as_chunks_mut().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn pages(content: Content) -> Vec<Vec<u8>> {
        let mut bytes = Vec::new();
        write_pages(&mut bytes, content, 256).unwrap();
        bytes.chunks(PAGE).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn pages_are_as_alike_as_they_should_be() {
        for (content, copies) in [(Content::Random, 1), (Content::Twin, 16), (Content::Colour, 1), (Content::Zero, 256)]
        {
            let mut counts = BTreeMap::new();
            for page in pages(content) {
                *counts.entry(page).or_insert(0) += 1;
            }
            assert!(counts.values().all(|&count| count == copies), "{content:?}");
        }
        assert!(pages(Content::Colour).iter().all(|page| page.chunks(4).all(|word| *word == page[..4])));
        assert!(pages(Content::Zero).iter().flatten().all(|&byte| byte == 0));
    }

    #[test]
    fn random_pages_use_every_byte_equally() {
        let mut counts = [0_u32; 256];
        for byte in pages(Content::Random).iter().flatten() {
            counts[usize::from(*byte)] += 1;
        }
        // 4096 of each on average; ten standard deviations.
        assert!(counts.iter().all(|count| count.abs_diff(4096) < 640), "{counts:?}");
    }

    #[test]
    fn a_file_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let contents = Contents::in_folder(folder.path()).unwrap();
        let path = contents.file(Content::Zero, 1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        let made = fs::metadata(&path).unwrap().modified().unwrap();
        assert_eq!(contents.file(Content::Zero, 1).unwrap(), path);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), made);
    }
}
