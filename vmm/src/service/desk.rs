//! The control API's way to the service: what the board answers, the board answers; the rest waits for the loop.

use super::board::Board;
use super::{Message, metrics};
use control::{ApiError, Handler, Metrics, Phase, Reply, Request};
use std::sync::mpsc::{Sender, sync_channel};

/// Answers API threads.
#[derive(Debug)]
pub(crate) struct Desk {
    board: Board,
    inbox: Sender<Message>,
}

impl Desk {
    pub(crate) fn new(board: Board, inbox: Sender<Message>) -> Self {
        Self { board, inbox }
    }
}

impl Handler for Desk {
    fn handle(&self, request: Request) -> Result<Reply, ApiError> {
        match request {
            Request::ShowVm => Ok(Reply::Vm(self.board.vm())),
            Request::ListDisks => Ok(Reply::Disks(self.board.disks())),
            Request::ListNics => Ok(Reply::Nics(self.board.nics())),
            Request::ShowMigration => Ok(Reply::Migration(self.board.last_migration())),
            Request::ShowDirtyRate => Ok(Reply::DirtyRate(self.board.last_dirty_rate())),
            request => {
                let (answer, awaited) = sync_channel(1);
                let gone = || ApiError::Failed { message: "This Godwit is ending".to_owned() };
                self.inbox.send(Message::Asked(request, answer)).map_err(|_| gone())?;
                awaited.recv().map_err(|_| gone())?
            }
        }
    }

    fn phase(&self) -> Phase {
        self.board.phase()
    }

    fn metrics(&self) -> Metrics {
        metrics::of(&self.board)
    }
}
