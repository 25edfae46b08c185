//! Connections: accepting, encrypting, bounding and ending them.
//!
//! A connection must send the head of its first request in time, may rest between requests only so
//! long, and must take what is sent to it. Bodies have a time limit of their own, where they are read.

mod activity;
mod paced;
#[cfg(feature = "tls")]
mod tls;
#[cfg(not(feature = "tls"))]
#[path = "no_tls.rs"]
mod tls;

use std::{convert::Infallible, io, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{Request, Version},
    response::Response,
};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

use activity::{Activity, Overdue};
use paced::PacedStream;
pub(crate) use tls::Tls;
pub use tls::{TlsError, install_provider};

use crate::{config::ConnectionLimits, state::AppState};

/// After the drain time, and for connections that are told to end: for last bytes to reach slow
/// readers.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// Serves until `shutdown` resolves and the running requests have ended.
///
/// On the signal `/ready` and new requests turn 503 at once. Connections are still accepted until
/// the running requests have ended, or the drain time is over, so that clients and balancers get
/// an answer. What the engine then still runs ends with a stream error event.
///
/// # Errors
/// The listener has failed for a minute.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let server = Arc::new(Server::new(state.clone()));
    // However this ends: what still runs then is cut off.
    let _cut = server.cut.clone().drop_guard();
    let drain = async {
        shutdown.await;
        let timeout = state.config().drain_timeout;
        tracing::info!(seconds = timeout.as_secs_f64(), "shutting down: running requests may finish");
        state.begin_drain();
        let all_ended = tokio::time::timeout(timeout, state.permits().all_returned()).await.is_ok();
        if !all_ended {
            tracing::warn!("the drain time is over with requests still running");
        }
        server.drained.cancel();
        // Whoever still holds a connection open then is cut off.
        tokio::time::sleep(LAST_BYTES).await;
    };
    tokio::select! {
        result = accept_all(&server, listener) => result,
        () = drain => Ok(()),
    }
}

/// What all connections share.
struct Server {
    state: AppState,
    router: Router,
    builder: Builder<TokioExecutor>,
    limits: ConnectionLimits,
    slots: Arc<Semaphore>,
    /// Running requests have ended: connections end with their answers.
    drained: CancellationToken,
    /// All must go at once.
    cut: CancellationToken,
}

impl Server {
    fn new(state: AppState) -> Self {
        /// A peer that is gone without a word is noticed by this.
        const PING: Duration = Duration::from_secs(20);
        let mut builder = Builder::new(TokioExecutor::new());
        // Ours covers more: TLS, HTTP/2, and what comes before the version is known.
        builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(PING).keep_alive_timeout(PING);
        let limits = state.config().connections.clone();
        Self {
            router: crate::router(state.clone()),
            builder,
            slots: Arc::new(Semaphore::new(limits.max_connections as usize)),
            limits,
            drained: CancellationToken::new(),
            cut: CancellationToken::new(),
            state,
        }
    }
}

/// Accepts until the server is drained, then waits for the connections to end.
async fn accept_all(server: &Arc<Server>, listener: TcpListener) -> io::Result<()> {
    /// Consecutive failures, a second apart, after which the listener is given up.
    const MAX_FAILURES: u32 = 60;
    let tracker = TaskTracker::new();
    let mut failures = 0;
    loop {
        let next = async {
            // Beyond the limit connections wait in the listener's backlog.
            let slot = Arc::clone(&server.slots).acquire_owned().await.map_err(io::Error::other)?;
            let (stream, _) = listener.accept().await?;
            Ok((stream, slot))
        };
        let accepted = tokio::select! {
            accepted = next => accepted,
            () = server.drained.cancelled() => break,
        };
        match accepted {
            Ok((stream, slot)) => {
                failures = 0;
                tracker.spawn(connection(Arc::clone(server), stream, slot));
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) if failures < MAX_FAILURES => {
                failures += 1;
                // Such as too many open files: others must end first.
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) => return Err(error),
        }
    }
    drop(listener);
    tracker.close();
    tracker.wait().await;
    Ok(())
}

/// Whether only that client is affected.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}

/// One connection from its first byte to its last.
async fn connection(server: Arc<Server>, stream: TcpStream, _slot: OwnedSemaphorePermit) {
    let open = server.state.metrics().connections().clone();
    open.inc();
    // Small events must leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let stream = PacedStream::new(stream, server.limits.stall_timeout);
    let activity = Activity::new();
    tokio::select! {
        () = encrypted(&server, stream, &activity) => {}
        () = server.cut.cancelled() => {}
    }
    open.dec();
}

/// Encrypts the connection if the server does.
async fn encrypted(server: &Server, stream: PacedStream<TcpStream>, activity: &Activity) {
    let Some(tls) = server.state.tls() else { return requests(server, stream, activity).await };
    let deadline = activity.first_head_deadline(&server.limits);
    match tokio::time::timeout_at(deadline, tls.accept(stream)).await {
        Ok(Ok(stream)) => requests(server, stream, activity).await,
        Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
        Err(_) => tracing::debug!("the TLS handshake took too long"),
    }
}

/// The requests of a connection, one after the other or interleaved.
async fn requests<S>(server: &Server, stream: S, activity: &Activity)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = hyper::service::service_fn(|request: Request<Incoming>| {
        let busy = activity.begin();
        let is_paced = request.version() == Version::HTTP_2;
        let answer = server.router.clone().oneshot(request.map(Body::new));
        async move {
            let response: Response = answer.await?;
            Ok::<_, Infallible>(response.map(|body| busy.during(body, is_paced)))
        }
    });
    let mut connection = pin!(server.builder.serve_connection(TokioIo::new(stream), service));
    let mut overdue = pin!(activity.overdue(&server.limits));
    let mut is_told = false;
    let mut last_bytes = pin!(tokio::time::sleep(Duration::ZERO));
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(error, "a connection has failed");
                }
                return;
            }
            why = overdue.as_mut(), if !is_told => {
                // Who takes nothing would not take the rest either.
                if why != Overdue::Idle {
                    tracing::debug!(?why, "a connection is closed");
                    return;
                }
                connection.as_mut().graceful_shutdown();
                is_told = true;
                last_bytes.as_mut().reset(tokio::time::Instant::now() + LAST_BYTES);
            }
            () = last_bytes.as_mut(), if is_told => return,
            () = server.drained.cancelled(), if !is_told => {
                connection.as_mut().graceful_shutdown();
                is_told = true;
                last_bytes.as_mut().reset(tokio::time::Instant::now() + LAST_BYTES);
            }
        }
    }
}
