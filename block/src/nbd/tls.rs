//! Who is believed to be a server or a client: certificates in a folder, by the names that QEMU and nbdkit use.
//!
//! `ca-cert.pem` says which certificates count. A server has `server-cert.pem` and `server-key.pem`, a client may have
//! `client-cert.pem` and `client-key.pem`. A server whose folder has `ca-cert.pem` takes only clients that have such a one.

use rustls::client::ClientConnection;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ServerConnection, WebPkiClientVerifier};
use rustls::{ClientConfig, Connection, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

const AUTHORITY: &str = "ca-cert.pem";

/// Why there is no TLS.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file is missing or is not what its name says.
    #[error("Could not use {} for TLS: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A certificate and its key, or the authorities, do not make a party.
    #[error("The certificates in {} cannot be used", folder.display())]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
    /// What the server is called is no name that a certificate could be for.
    #[error("{name:?} is no name that a certificate could be for; give one with tls-hostname")]
    Name {
        /// The name.
        name: String,
    },
}

/// What a client knows of whom it calls.
#[derive(Debug, Clone)]
pub(super) struct TlsClient {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl TlsClient {
    /// A client with the certificates in `folder` that calls a server with a certificate for `name`.
    pub(super) fn new(folder: &Path, name: &str) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { folder: folder.to_owned(), source };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(authorities(folder)?);
        let config = match pair(folder, "client")? {
            Some((certificates, key)) => builder.with_client_auth_cert(certificates, key).map_err(unusable)?,
            None => builder.with_no_client_auth(),
        };
        let name = ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { name: name.to_owned() })?;
        Ok(Self { config: Arc::new(config), name })
    }

    /// The client's end of a new connection.
    pub(super) fn begin(&self) -> Result<Connection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), self.name.clone()).map(Connection::from)
    }
}

/// What a server shows those who call it, and asks of them.
#[derive(Debug, Clone)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
}

impl TlsServer {
    /// A server with the certificates in `folder`.
    ///
    /// # Errors
    /// [`TlsError`] that names the file, or what does not fit.
    pub fn new(folder: &Path) -> Result<Self, TlsError> {
        let unusable = |source| TlsError::Unusable { folder: folder.to_owned(), source };
        let builder =
            ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().map_err(unusable)?;
        let builder = if folder.join(AUTHORITY).exists() {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(folder)?), provider());
            let path = folder.join(AUTHORITY);
            let built = verifier.build().map_err(|error| TlsError::File { path, reason: error.to_string() })?;
            builder.with_client_cert_verifier(built)
        } else {
            builder.with_no_client_auth()
        };
        let missing =
            || TlsError::File { path: folder.join("server-cert.pem"), reason: "there is no such file".into() };
        let (certificates, key) = pair(folder, "server")?.ok_or_else(missing)?;
        Ok(Self { config: Arc::new(builder.with_single_cert(certificates, key).map_err(unusable)?) })
    }

    /// The server's end of a new connection.
    pub(super) fn begin(&self) -> Result<Connection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.config)).map(Connection::from)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn authorities(folder: &Path) -> Result<RootCertStore, TlsError> {
    let path = folder.join(AUTHORITY);
    let mut store = RootCertStore::empty();
    for certificate in certificates(&path)? {
        store.add(certificate).map_err(|error| TlsError::File { path: path.clone(), reason: error.to_string() })?;
    }
    Ok(store)
}

/// Certificate and key of a party, if it has one.
fn pair(
    folder: &Path,
    party: &str,
) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, TlsError> {
    let (certificate, key) = (folder.join(format!("{party}-cert.pem")), folder.join(format!("{party}-key.pem")));
    if !certificate.exists() {
        return Ok(None);
    }
    let unreadable =
        |error: rustls::pki_types::pem::Error| TlsError::File { path: key.clone(), reason: error.to_string() };
    Ok(Some((certificates(&certificate)?, PrivateKeyDer::from_pem_file(&key).map_err(unreadable)?)))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |reason: String| TlsError::File { path: path.to_owned(), reason };
    let all = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|error| wrong(error.to_string()))?;
    if all.is_empty() { Err(wrong("it has no certificate".to_owned())) } else { Ok(all) }
}
