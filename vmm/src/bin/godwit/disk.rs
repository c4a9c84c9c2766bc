//! `disk`: disks for other hosts, and what other hosts have.

use crate::UsageError;
use crate::args::{CacheArg, DiskCommand, ListExports, Serve};
use crate::show;
use anyhow::Context;
use block::file::{Engine, FileOptions, HostCache};
use block::nbd::client::list_exports;
use block::nbd::tls::TlsServer;
use block::nbd::uri::{Address, Privacy};
use block::{Access, Export, FileBackend, Listener, NbdServer, NbdUri, ServerOptions};
use control::PeerAddress;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use vmm::seccomp::{self, Seccomp};

/// How long a server may take to tell of its exports.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Does what was asked for.
pub(crate) fn run(command: &DiskCommand) -> anyhow::Result<u8> {
    match command {
        DiskCommand::Serve(serve) => self::serve(serve),
        DiskCommand::Exports(list) => exports(list),
    }
}

fn exports(list: &ListExports) -> anyhow::Result<u8> {
    let names = list_exports(&list.server, ANSWER_WITHIN)?;
    if list.json {
        return show::json(&serde_json::json!({ "exports": names }));
    }
    names.iter().for_each(|name| println!("{name}"));
    Ok(0)
}

/// Serves until a signal comes.
fn serve(serve: &Serve) -> anyhow::Result<u8> {
    let named = serve.exports().map_err(UsageError)?;
    // Before anything is there that a signal would leave behind.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("Cannot watch signals")?;
    if Seccomp::from(serve.seccomp) == Seccomp::On {
        seccomp::switch_on()?;
    }
    let access = if serve.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let host_cache = match serve.cache {
        CacheArg::Writeback => HostCache::Used,
        CacheArg::None => HostCache::Bypassed,
    };
    let thread_start = seccomp::enter_disk_server;
    let options = FileOptions { access, host_cache, engine: Engine::Auto, thread_start };
    let mut exports = Vec::new();
    for (name, path) in &named {
        if let Some(length) = serve.create {
            create(path, length)?;
        }
        let backend = Arc::new(FileBackend::open_unlocked(path, options)?);
        exports.push(Export { name: name.clone(), description: path.display().to_string(), backend, access });
    }
    let tls = serve.tls_certificates.as_deref().map(TlsServer::new).transpose()?;
    let privacy = serve
        .tls_certificates
        .as_ref()
        .map_or(Privacy::Plain, |certificates| Privacy::Tls { certificates: certificates.clone(), hostname: None });
    let mut listeners = Vec::new();
    for address in &serve.listen {
        let listener = Listener::bind(&address_of(address))?;
        for (name, _) in &named {
            let address = listener.address().clone();
            println!("{}", NbdUri { address, export: name.clone(), privacy: privacy.clone() });
        }
        listeners.push(listener);
    }
    let server =
        NbdServer::start(listeners, exports, ServerOptions { tls, clients: serve.clients, lists: true, thread_start })
            .context("Could not start the server")?;
    let _ = signals.forever().next();
    eprintln!("godwit: {} clients are served to the end of their requests", server.clients());
    drop(server);
    Ok(0)
}

fn address_of(address: &PeerAddress) -> Address {
    match address {
        PeerAddress::Tcp { host, port } => Address::Tcp { host: host.clone(), port: *port },
        PeerAddress::Unix(path) => Address::Unix(path.clone()),
    }
}

/// Makes a file of so many zeros, unless there is one.
fn create(path: &Path, length: u64) -> anyhow::Result<()> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => file.set_len(length).with_context(|| format!("Could not make disk {}", path.display())),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error).with_context(|| format!("Could not make disk {}", path.display())),
    }
}
