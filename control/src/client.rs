//! The client of the control API, for the command line and for tests: one call, one connection, one answer.
//!
//! It blocks the calling thread and starts none.

use crate::error::ErrorBody;
use crate::event::Event;
use crate::reply::Reply;
use crate::request::Request;
use crate::routes::{Operation, Route, body_of};
use crate::socket::{SocketError, check_path};
use crate::sse;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

/// How long an answer may take: a little more than the server gives its handler.
const ANSWER_WITHIN: Duration = Duration::from_secs(35);

/// How long a stream may be silent: a few of the server's heartbeats.
const SILENT_WITHIN: Duration = Duration::from_secs(60);

/// A larger answer is not from a Godwit.
const ANSWER_MAX: usize = 16 << 20;

/// Why a call has no reply.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The path cannot be that of a socket.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// There is no such file.
    #[error("No Godwit listens at {}: there is no such socket", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// There is a file that nobody listens to.
    #[error("No Godwit listens at {}: the process that made the socket has ended", path.display())]
    NobodyListens {
        /// The path.
        path: PathBuf,
    },
    /// There is something else.
    #[error("No Godwit listens at {}: it is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The file belongs to someone else.
    #[error(
        "No permission to talk to the Godwit at {}: the socket is for the user who started it, and for root",
        path.display()
    )]
    NotPermitted {
        /// The path.
        path: PathBuf,
    },
    /// The host refused something else.
    #[error("The Godwit at {} cannot be reached", path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The Godwit refused, or failed to do, what was asked.
    #[error("{}", body.message)]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The reasons.
        body: ErrorBody,
    },
    /// The connection ended before the answer; the Godwit may have ended.
    #[error("The Godwit at {} closed the connection before it answered", path.display())]
    Closed {
        /// The path.
        path: PathBuf,
        /// What was wrong with the connection.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The answer took too long.
    #[error("The Godwit at {} did not answer within {} s", path.display(), within.as_secs())]
    TimedOut {
        /// The path.
        path: PathBuf,
        /// How long it was waited for.
        within: Duration,
    },
    /// Something answered that is no Godwit, or one that this client does not understand.
    #[error("What listens at {} does not answer like a Godwit: {reason}", path.display())]
    NotUnderstood {
        /// The path.
        path: PathBuf,
        /// What was not understood.
        reason: String,
    },
}

/// Where a stream of events begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// With the next event.
    Now,
    /// With the event after this number, as far back as events are kept; 0 for all.
    Sequence(u64),
}

/// A client of the Godwit at one path. It holds no connection.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    within: Duration,
}

impl Client {
    /// A client of the Godwit at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), within: ANSWER_WITHIN }
    }

    /// Waits for `within` instead of the default for each answer.
    #[must_use]
    pub fn with_timeout(self, within: Duration) -> Self {
        Self { within, ..self }
    }

    /// Where the Godwit is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks for something and waits for the reply.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Refused`] when the Godwit itself says no.
    pub fn call(&self, request: &Request) -> Result<Reply, ClientError> {
        let body = body_of(request).map_err(|error| self.not_understood(&error))?;
        let answer = self.exchange(Route::of(request), body)?;
        Reply::from_json(request, &answer).map_err(|error| self.not_understood(&error))
    }

    /// The numbers for Prometheus, as text.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn metrics(&self) -> Result<String, ClientError> {
        let answer = self.exchange(Route::with(Operation::ShowMetrics), None)?;
        String::from_utf8(answer.into()).map_err(|error| self.not_understood(&error))
    }

    /// Subscribes to the events. When this returns, every later event will be in the stream.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn events(&self, after: After) -> Result<EventStream, ClientError> {
        let runtime = self.runtime()?;
        let body = runtime.block_on(self.within(async {
            let answer = self.send(Route::with(Operation::WatchEvents), None, after).await?;
            self.accepted(answer).await
        }))?;
        Ok(EventStream { client: self.clone(), runtime, body: Some(body), reader: sse::Reader::default() })
    }

    fn exchange(&self, route: &Route, body: Option<Vec<u8>>) -> Result<Bytes, ClientError> {
        self.runtime()?.block_on(self.within(async {
            let answer = self.send(route, body, After::Now).await?;
            let answer = self.accepted(answer).await?;
            self.collect(answer).await
        }))
    }

    /// Connects and sends the request; the answer's body is still to come.
    async fn send(
        &self,
        route: &Route,
        body: Option<Vec<u8>>,
        after: After,
    ) -> Result<Response<Incoming>, ClientError> {
        check_path(&self.path)?;
        let stream = UnixStream::connect(&self.path).await.map_err(|error| self.no_connection(error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.closed(error))?;
        tokio::spawn(connection);
        let mut request = hyper::Request::builder().method(&route.method).uri(route.path).header(HOST, "godwit");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let After::Sequence(sequence) = after {
            request = request.header("last-event-id", sequence);
        }
        let request = request
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.not_understood(&error))?;
        sender.send_request(request).await.map_err(|error| self.closed(error))
    }

    /// The body of an answer that says yes.
    async fn accepted(&self, answer: Response<Incoming>) -> Result<Incoming, ClientError> {
        let (status, body) = (answer.status(), answer.into_body());
        if status.is_success() {
            return Ok(body);
        }
        let body = self.collect(body).await?;
        match serde_json::from_slice(&body) {
            Ok(body) => Err(ClientError::Refused { status: status.as_u16(), body }),
            Err(_) => {
                let reason = format!("status {status}");
                Err(ClientError::NotUnderstood { path: self.path.clone(), reason })
            }
        }
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, ClientError> {
        let body = Limited::new(body, ANSWER_MAX).collect().await;
        body.map(http_body_util::Collected::to_bytes).map_err(|error| self.closed(error))
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        tokio::time::timeout(self.within, work)
            .await
            .unwrap_or_else(|_| Err(ClientError::TimedOut { path: self.path.clone(), within: self.within }))
    }

    fn runtime(&self) -> Result<Runtime, ClientError> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        runtime.map_err(|source| ClientError::Host { path: self.path.clone(), source })
    }

    fn no_connection(&self, source: io::Error) -> ClientError {
        let path = self.path.clone();
        match source.kind() {
            ErrorKind::NotFound => ClientError::NoSocket { path },
            ErrorKind::ConnectionRefused => match path.metadata() {
                Ok(found) if !found.file_type().is_socket() => ClientError::NotASocket { path },
                Ok(_) | Err(_) => ClientError::NobodyListens { path },
            },
            ErrorKind::PermissionDenied => ClientError::NotPermitted { path },
            _ => ClientError::Host { path, source },
        }
    }

    fn closed(&self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> ClientError {
        ClientError::Closed { path: self.path.clone(), source: source.into() }
    }

    fn not_understood(&self, reason: &dyn StdError) -> ClientError {
        ClientError::NotUnderstood { path: self.path.clone(), reason: reason.to_string() }
    }
}

/// The events of a Godwit, in order. The iterator ends when the Godwit ends, and after an error or a
/// [`Lagged`](crate::Happening::Lagged) event; to go on, subscribe again after the last event's number.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
    runtime: Runtime,
    /// `None` after the end.
    body: Option<Incoming>,
    reader: sse::Reader,
}

impl EventStream {
    fn read(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(data) = self.reader.next() {
                let event = serde_json::from_slice(&data).map_err(|error| self.client.not_understood(&error))?;
                return Ok(Some(event));
            }
            let Some(body) = &mut self.body else { return Ok(None) };
            let silent = || ClientError::TimedOut { path: self.client.path.clone(), within: SILENT_WITHIN };
            let frame = self.runtime.block_on(async { tokio::time::timeout(SILENT_WITHIN, body.frame()).await });
            let Some(frame) = frame.map_err(|_| silent())? else { return Ok(None) };
            let frame = frame.map_err(|error| self.client.closed(error))?;
            if let Some(piece) = frame.data_ref() {
                self.reader.push(piece).map_err(|error| self.client.not_understood(&error))?;
            }
        }
    }
}

impl Iterator for EventStream {
    type Item = Result<Event, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.body.as_ref()?;
        let next = self.read().transpose();
        if !matches!(next, Some(Ok(_))) {
            self.body = None;
        }
        next
    }
}

#[cfg(test)]
mod tests;
