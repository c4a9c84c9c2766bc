//! The options of `disk`.

use super::{SeccompArg, whole};
use crate::values::size;
use block::NbdUri;
use clap::{Args, Subcommand, ValueEnum};
use control::PeerAddress;
use std::path::PathBuf;

/// What to do with disks beside guests.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Serve raw files or block devices by NBD until a signal comes
    Serve(Serve),
    /// List the exports of an NBD server
    Exports(ListExports),
}

// `disk serve`.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The disks: FILE, or NAME=FILE for an export of another name than the file's
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<String>,
    /// Where to listen: tcp://HOST:PORT or unix:/PATH; may be repeated
    #[arg(long, default_value = "tcp://127.0.0.1:10809", value_name = "ADDRESS")]
    pub(crate) listen: Vec<PeerAddress>,
    /// Let clients only read
    #[arg(long)]
    pub(crate) read_only: bool,
    /// How the host's page cache is used
    #[arg(long, value_enum, default_value = "writeback")]
    pub(crate) cache: CacheArg,
    /// Make each disk that is not there, with so many bytes of zeros that take no space
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) create: Option<u64>,
    /// Serve only by TLS, with ca-cert.pem, server-cert.pem and server-key.pem of this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// The most clients at a time
    #[arg(long, default_value = "64", value_name = "N")]
    pub(crate) clients: usize,
    /// Confine each thread to the system calls that it needs
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) seccomp: SeccompArg,
}

/// Use of the host's page cache, on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheArg {
    /// Read and write through it
    Writeback,
    /// Go past it
    None,
}

// `disk exports`.
#[derive(Debug, Args)]
pub(crate) struct ListExports {
    /// The server, such as nbd://HOST or nbd+unix:///?socket=PATH
    pub(crate) server: NbdUri,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Serve {
    /// The name of each export, and its file.
    pub(crate) fn exports(&self) -> Result<Vec<(String, PathBuf)>, String> {
        let export = |text: &String| {
            let (name, file) = match text.split_once('=') {
                Some((name, file)) => (Some(name.to_owned()), PathBuf::from(file)),
                None => (None, PathBuf::from(text)),
            };
            let of_file = || file.file_name().map(|name| name.to_string_lossy().into_owned());
            let name = name.or_else(of_file).ok_or_else(|| format!("{text:?} is no file; write NAME=FILE"))?;
            Ok((name, whole(&file)))
        };
        let all: Vec<(String, PathBuf)> = self.disks.iter().map(export).collect::<Result<_, String>>()?;
        let twice = all.iter().enumerate().find(|(at, (name, _))| all[..*at].iter().any(|(other, _)| other == name));
        match twice {
            Some((_, (name, _))) => Err(format!("Two disks would be the export {name:?}; write NAME=FILE for one")),
            None => Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Command, CommandLine};
    use super::*;
    use clap::Parser;

    fn serve(options: &[&str]) -> Serve {
        match CommandLine::try_parse_from(["godwit", "disk", "serve"].iter().chain(options)).unwrap().command {
            Command::Disk(DiskCommand::Serve(serve)) => serve,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn exports_have_names() {
        let exports = serve(&["/d/a.img", "data=/d/b=c.img", "=/d/e"]).exports().unwrap();
        let named = |name: &str, file: &str| (name.to_owned(), PathBuf::from(file));
        assert_eq!(exports, [named("a.img", "/d/a.img"), named("data", "/d/b=c.img"), named("", "/d/e")]);
        assert!(serve(&["/a/x", "/b/x"]).exports().unwrap_err().contains(r#"the export "x""#));
        assert!(serve(&["/"]).exports().unwrap_err().contains("write NAME=FILE"));
    }

    #[test]
    fn there_is_a_usual_place() {
        assert_eq!(serve(&["/d"]).listen, ["tcp://127.0.0.1:10809".parse().unwrap()]);
        let listen = serve(&["/d", "--listen=unix:/s", "--listen=tcp://h:1"]).listen;
        assert_eq!(listen, ["unix:/s".parse().unwrap(), "tcp://h:1".parse().unwrap()]);
    }
}
