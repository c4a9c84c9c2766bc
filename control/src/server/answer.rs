//! From one HTTP request to its answer: find the route, read the body, ask [`admit`], call the handler, write the reply.

use super::stream::{EventBody, Subscriber};
use super::{Handler, ServerEnd, ServerOptions};
use crate::error::ApiError;
use crate::event::Events;
use crate::metrics;
use crate::openapi::OPENAPI;
use crate::phase::admit;
use crate::reply::Reply;
use crate::request::Request;
use crate::routes::{Asked, Content, Route};
use crate::sse;
use bytes::Bytes;
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

const JSON: &str = "application/json";

/// A whole answer or a stream.
pub(super) type AnswerBody = Either<Full<Bytes>, EventBody>;

/// What every connection needs.
pub(super) struct Desk {
    handler: Arc<dyn Handler>,
    events: Events,
    pub(super) options: ServerOptions,
    pub(super) end: ServerEnd,
    workers: Arc<Semaphore>,
    seats: Arc<Semaphore>,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Desk {
    pub(super) fn new(handler: Arc<dyn Handler>, events: Events, options: ServerOptions, end: ServerEnd) -> Self {
        let workers = Arc::new(Semaphore::new(options.limits.workers.max(1)));
        let seats = Arc::new(Semaphore::new(options.limits.subscribers));
        Self { handler, events, options, end, workers, seats }
    }
}

/// Answers `request`; a failure is an answer too.
pub(super) async fn answer(desk: &Desk, request: hyper::Request<Incoming>) -> Result<Response<AnswerBody>, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = respond(desk, request).await.unwrap_or_else(|error| {
        tracing::debug!(%method, path, %error, "a request failed");
        failure(&error)
    });
    Ok(answer)
}

async fn respond(desk: &Desk, request: hyper::Request<Incoming>) -> Result<Response<AnswerBody>, ApiError> {
    let route = Route::find(request.method(), request.uri().path())?;
    if request.uri().query().is_some() {
        return Err(ApiError::UnexpectedQuery { path: route.path });
    }
    let (head, body) = request.into_parts();
    let body = read_body(desk, body).await?;
    match route.read(&body)? {
        Asked::Call(request) => call(desk, route, request).await,
        Asked::Metrics => {
            let text = on_worker(desk, |handler| Ok(handler.metrics().render())).await?;
            Ok(whole(StatusCode::OK, metrics::CONTENT_TYPE, text.into()))
        }
        Asked::OpenApi => Ok(whole(StatusCode::OK, JSON, Bytes::from_static(OPENAPI.as_bytes()))),
        Asked::Events => subscribe(desk, &head.headers),
    }
}

async fn read_body(desk: &Desk, body: Incoming) -> Result<Bytes, ApiError> {
    let limits = &desk.options.limits;
    let too_large = || ApiError::BodyTooLarge { limit: limits.body_bytes };
    if body.size_hint().lower() > u64::try_from(limits.body_bytes).unwrap_or(u64::MAX) {
        return Err(too_large());
    }
    match timeout(limits.body_within, Limited::new(body, limits.body_bytes).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::InvalidBody { reason: error.to_string() }),
        Err(_) => Err(ApiError::SlowBody { seconds: limits.body_within.as_secs() }),
    }
}

async fn call(desk: &Desk, route: &Route, request: Request) -> Result<Response<AnswerBody>, ApiError> {
    let test_requests = desk.options.test_requests;
    let reply = on_worker(desk, move |handler| {
        let phase = handler.phase();
        test_requests.admit(phase, &request)?;
        admit(phase, &request)?;
        handler.handle(request)
    });
    let reply = reply.await?;
    let expected = if let Content::Json(schema) = route.content { Some(schema) } else { None };
    if reply.schema() != expected {
        tracing::error!(path = route.path, ?reply, "the handler gave the wrong kind of reply");
        return Err(ApiError::Failed { message: format!("Godwit has a bug: {} got a wrong reply", route.path) });
    }
    let status = StatusCode::from_u16(route.status).unwrap_or(StatusCode::OK);
    if reply == Reply::Done {
        let mut answer = Response::new(Either::Left(Full::default()));
        *answer.status_mut() = status;
        return Ok(answer);
    }
    let json = reply.to_json().map_err(|error| ApiError::failed(&error))?;
    Ok(whole(status, JSON, json.into()))
}

/// Lets the handler work on a thread of its own, within the limits on time and number.
async fn on_worker<T: Send + 'static>(
    desk: &Desk,
    work: impl FnOnce(&dyn Handler) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let within = desk.options.limits.answer_within;
    let deadline = Instant::now() + within;
    let permit = timeout_at(deadline, Arc::clone(&desk.workers).acquire_owned()).await;
    let Ok(Ok(permit)) = permit else { return Err(ApiError::Busy { what: "requests" }) };
    let handler = Arc::clone(&desk.handler);
    let done = tokio::task::spawn_blocking(move || {
        // Held to the end of the work, even when nobody waits for it any more.
        let _permit = permit;
        work(&*handler)
    });
    match timeout_at(deadline, done).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => {
            tracing::error!(%error, "the handler of the control API panicked");
            Err(ApiError::Failed { message: "Godwit has a bug: the request made it panic; see its log".to_owned() })
        }
        Err(_) => Err(ApiError::TimedOut { seconds: within.as_secs() }),
    }
}

fn subscribe(desk: &Desk, headers: &HeaderMap) -> Result<Response<AnswerBody>, ApiError> {
    let known = headers.get("last-event-id").map(|id| {
        id.to_str().ok().and_then(|id| id.parse().ok()).ok_or_else(|| ApiError::InvalidValue {
            field: "Last-Event-ID",
            reason: format!("{id:?} is not the number of an event"),
        })
    });
    let known = known.transpose()?;
    let seat = Arc::clone(&desk.seats).try_acquire_owned();
    let Ok(seat) = seat else { return Err(ApiError::Busy { what: "subscribers" }) };
    let heartbeat = desk.options.limits.heartbeat;
    let subscriber = Subscriber::new(desk.events.clone(), known, heartbeat, desk.end.clone(), seat);
    let mut answer = Response::new(Either::Right(EventBody::new(subscriber)));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(sse::CONTENT_TYPE));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(answer)
}

fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<AnswerBody> {
    let mut answer = Response::new(Either::Left(Full::new(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

fn failure(error: &ApiError) -> Response<AnswerBody> {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(&error.body()).unwrap_or_default();
    let mut answer = whole(status, JSON, body.into());
    if let ApiError::MethodNotAllowed { allow, .. } = error
        && let Ok(allow) = HeaderValue::from_str(allow)
    {
        answer.headers_mut().insert(ALLOW, allow);
    }
    answer
}
