//! The HTTP server of the control API: one thread, `godwit-api`, with everything bounded.
//!
//! The VMM starts it with a [`ControlSocket`], its [`Handler`] and its [`Events`]. Requests are read and answered on the
//! one thread; the handler itself runs on at most [`Limits::workers`] further threads (`godwit-api-req`) that exist
//! while they are needed, so that a slow answer does not hold up the others. Limits hold for the number of connections,
//! the size and time of requests, the time of answers, and clients that do not read.
//!
//! On drop the server takes no more requests, gives the answers and events under way a moment to arrive, and removes the
//! socket.

mod answer;
mod paced;
mod stream;

use crate::error::ApiError;
use crate::event::Events;
use crate::metrics::Metrics;
use crate::phase::{Phase, TestRequests};
use crate::reply::Reply;
use crate::request::Request;
use crate::socket::{ControlSocket, SocketFile};
use answer::Desk;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use paced::Paced;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// How much of a request's head, or of an answer, is kept in memory per connection.
const CONNECTION_BUFFER: usize = 16 << 10;

/// How many headers a request may have.
const HEADERS_MAX: usize = 64;

/// The pause after the host refused to accept a connection, for example because there are no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The VM as the server sees it.
///
/// The methods are called from several threads at once and should return soon: what takes long becomes a job that the
/// reply names and the events follow. The server has asked [`admit`](crate::admit) with [`phase`](Self::phase) just
/// before it calls [`handle`](Self::handle); a handler whose phase can change in between asks again under its own lock.
pub trait Handler: Send + Sync + 'static {
    /// Does what is asked.
    ///
    /// # Errors
    /// Why it was not done, for the person who asked.
    fn handle(&self, request: Request) -> Result<Reply, ApiError>;

    /// What the VM is doing.
    fn phase(&self) -> Phase;

    /// The numbers for Prometheus.
    fn metrics(&self) -> Metrics;
}

/// What one server takes from its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once. Further clients wait.
    pub connections: usize,
    /// Subscribers to events at once, all of them connections. Further ones are turned away.
    pub subscribers: usize,
    /// Calls of the handler at once. Further ones wait, within [`answer_within`](Self::answer_within).
    pub workers: usize,
    /// The size of a request's body.
    pub body_bytes: usize,
    /// The time for a request's head, and that for which a connection may be idle.
    pub head_within: Duration,
    /// The time for a request's body.
    pub body_within: Duration,
    /// The time for the handler.
    pub answer_within: Duration,
    /// How long a client may leave an answer unread.
    pub read_within: Duration,
    /// The pause between two signs of life to a subscriber.
    pub heartbeat: Duration,
    /// How long the answers under way may take when the server ends.
    pub end_within: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            subscribers: 32,
            workers: 4,
            body_bytes: 64 << 10,
            head_within: Duration::from_secs(10),
            body_within: Duration::from_secs(10),
            answer_within: Duration::from_secs(30),
            read_within: Duration::from_secs(10),
            heartbeat: Duration::from_secs(15),
            end_within: Duration::from_secs(1),
        }
    }
}

/// How a server is started.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Whether requests for tests are admitted.
    pub test_requests: TestRequests,
    /// What it takes from its clients.
    pub limits: Limits,
    /// What the server's thread does before anything else; its process's way to confine it. Further threads are its
    /// children.
    pub thread_start: fn(),
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { test_requests: TestRequests::default(), limits: Limits::default(), thread_start: || {} }
    }
}

/// Why a server cannot start.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The host refused what the server needs to wait for clients.
    #[error("The control API cannot wait for clients")]
    Runtime(#[source] io::Error),
    /// The host refused a thread.
    #[error("The thread of the control API cannot be started")]
    Thread(#[source] io::Error),
}

/// A running server. It ends on drop.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    file: SocketFile,
}

impl Server {
    /// Starts to answer the clients of `socket`.
    ///
    /// # Errors
    /// [`ServerError`] if the host refuses a resource; the socket is removed then.
    pub fn start(
        socket: ControlSocket,
        handler: Arc<dyn Handler>,
        events: Events,
        options: ServerOptions,
    ) -> Result<Self, ServerError> {
        let (listener, file) = socket.into_parts();
        let runtime = runtime(options.limits.workers).map_err(ServerError::Runtime)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener).map_err(ServerError::Runtime)?
        };
        let (stop, end) = watch::channel(false);
        let thread_start = options.thread_start;
        let desk = Arc::new(Desk::new(handler, events, options, ServerEnd(end)));
        let thread = std::thread::Builder::new()
            .name("godwit-api".to_owned())
            .spawn(move || {
                thread_start();
                runtime.block_on(serve(listener, desk));
                // A handler that hangs must not hold up the end of the process.
                runtime.shutdown_background();
            })
            .map_err(ServerError::Thread)?;
        Ok(Self { stop, thread: Some(thread), file })
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the control API panicked");
        }
    }
}

/// The order to end, as connections and streams see it.
#[derive(Clone, Debug)]
struct ServerEnd(watch::Receiver<bool>);

impl ServerEnd {
    fn has_come(&self) -> bool {
        *self.0.borrow()
    }

    async fn wait(&mut self) {
        // A server that is gone without the order has ended too.
        drop(self.0.wait_for(|ending| *ending).await);
    }
}

/// Everything on the calling thread, but for the handler's calls.
fn runtime(workers: usize) -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(workers.max(1))
        .thread_name("godwit-api-req")
        .thread_keep_alive(Duration::from_secs(1))
        .build()
}

/// Accepts clients until the server is stopped, then waits for the last answers.
async fn serve(listener: UnixListener, desk: Arc<Desk>) {
    let mut end = desk.end.clone();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = end.wait() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < desk.options.limits.connections => match accepted {
                Ok((stream, _)) => { connections.spawn(converse(stream, Arc::clone(&desk))); }
                Err(error) => {
                    tracing::warn!(%error, "a client of the control API could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let last_answers = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(desk.options.limits.end_within, last_answers).await.is_err() {
        tracing::warn!("clients of the control API were cut off");
    }
}

/// Answers one client, request by request.
async fn converse(stream: UnixStream, desk: Arc<Desk>) {
    let limits = &desk.options.limits;
    let mut end = desk.end.clone();
    let service = service_fn(|request| answer::answer(&desk, request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_within)
        .max_buf_size(CONNECTION_BUFFER)
        .max_headers(HEADERS_MAX)
        .serve_connection(Paced::new(TokioIo::new(stream), limits.read_within), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = end.wait() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client of the control API was cut off");
    }
}

#[cfg(test)]
mod tests;
