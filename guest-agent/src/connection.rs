//! The one ttrpc connection, on which the agent is the server although it dialled.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use agent_api::ttrpc;
use agent_api::ttrpc::r#async::transport::Listener;
use agent_api::ttrpc::r#async::{Server, Service};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use crate::fd::Fd;

/// Serves `services` on `connection`. `lost` is told when the other side has hung up.
///
/// # Errors
/// When ttrpc cannot start.
pub async fn serve(
    connection: Fd,
    services: impl IntoIterator<Item = HashMap<String, Service>>,
    lost: Arc<Notify>,
) -> ttrpc::Result<Server> {
    let only = futures::stream::iter([Ok::<_, io::Error>(Watched { connection, lost })]);
    let mut server = Server::new().add_listener(Listener::new(only));
    for service in services {
        server = server.register_service(service);
    }
    server.start().await?;
    Ok(server)
}

/// ttrpc does not tell its user that a connection has ended; this does.
struct Watched {
    connection: Fd,
    lost: Arc<Notify>,
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let done = ready!(Pin::new(&mut this.connection).poll_read(cx, buf));
        if done.is_err() || buf.filled().len() == before {
            this.lost.notify_one();
        }
        Poll::Ready(done)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().connection).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().connection).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().connection).poll_shutdown(cx)
    }
}
