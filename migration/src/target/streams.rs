//! The further streams of a migration at the target: the door that their links come through, and a thread for each.
//!
//! The doorman takes links in until all streams have joined or nothing more is expected. A link that does not say which
//! stream of this migration it is may be a question about another one, which is answered, or a stranger.

use super::error::Fault;
use super::install::{Buffers, Wait, install, receive_raw};
use super::intake::Intake;
use super::{Further, verdict};
use crate::bell::Bell;
use crate::channel::{Channel, TICK, in_words};
use crate::clock::Clock;
use crate::counts::PageCounts;
use crate::guest::{Claims, GuestPages};
use crate::link::{Cutter, Link};
use crate::wire::{Frame, Join, Kind, MAX_STREAMS};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Duration;
use uuid::Uuid;

/// How long a link that has begun to speak may take to say which stream it is.
const JOINING: Duration = Duration::from_secs(1);

/// How often silent links are looked at.
const LISTENING: Duration = Duration::from_millis(5);

/// Links that may be silent at a time. Where there are more, the oldest goes: most of them are strangers.
const SILENT_LINKS: usize = 2 * MAX_STREAMS as usize;

/// What can end the further streams. Dropping it does.
#[derive(Debug)]
pub(super) struct Crew<M: GuestPages, C: Cutter> {
    intake: Arc<Intake<M>>,
    cutters: Arc<Mutex<Vec<C>>>,
}

impl<M: GuestPages, C: Cutter> Drop for Crew<M, C> {
    fn drop(&mut self) {
        self.intake.close();
        self.cutters.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(Cutter::cut);
    }
}

/// Lets links in.
pub(super) struct Doorman<'a, L: Link, M, C> {
    further: Further<'a, L>,
    session: Uuid,
    intake: Arc<Intake<M>>,
    claims: &'a C,
    cutters: Arc<Mutex<Vec<L::Cutter>>>,
    clock: &'a dyn Clock,
    patience: Duration,
}

impl<'a, L, M, C> Doorman<'a, L, M, C>
where
    L: Link + 'a,
    M: GuestPages + 'a,
    C: Claims + Sync,
{
    /// Puts a doorman at the door, who lets in as many streams as `intake` has beside the first.
    pub(super) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        further: Further<'a, L>,
        session: Uuid,
        intake: &Arc<Intake<M>>,
        claims: &'a C,
        clock: &'a dyn Clock,
        patience: Duration,
    ) -> io::Result<Crew<M, L::Cutter>>
    where
        'a: 'scope,
    {
        let cutters = Arc::new(Mutex::new(Vec::new()));
        let crew = Crew { intake: Arc::clone(intake), cutters: Arc::clone(&cutters) };
        if intake.further_streams() > 0 {
            let doorman = Self { further, session, intake: Arc::clone(intake), claims, cutters, clock, patience };
            Builder::new().name("streams".to_owned()).spawn_scoped(scope, move || {
                (doorman.further.thread)();
                doorman.serve(scope);
            })?;
        }
        Ok(crew)
    }

    fn serve<'scope>(self, scope: &'scope Scope<'scope, '_>)
    where
        'a: 'scope,
    {
        let mut missing: Vec<u16> = (1..=self.intake.further_streams()).collect();
        let mut silent = VecDeque::new();
        while !missing.is_empty() && !self.intake.is_closed() {
            match (self.further.accept)(if silent.is_empty() { TICK } else { LISTENING }) {
                Ok(Some(link)) => silent.push_back(link),
                Ok(None) => {}
                Err(error) => return self.intake.fail(Fault::Link(error)),
            }
            if silent.len() > SILENT_LINKS {
                silent.pop_front();
            }
            for mut link in std::mem::take(&mut silent) {
                match link.wait(Duration::ZERO) {
                    Ok(true) => {
                        if let Err(fault) = self.listen(scope, link, &mut missing) {
                            tracing::info!(fault = in_words(&fault), "a link was not let into a migration");
                        }
                    }
                    Ok(false) => silent.push_back(link),
                    Err(_) => {}
                }
            }
        }
    }

    /// Hears what a link has to say.
    fn listen<'scope>(&self, scope: &'scope Scope<'scope, '_>, mut link: L, missing: &mut Vec<u16>) -> Result<(), Fault>
    where
        'a: 'scope,
    {
        link.set_patience(JOINING);
        let (mut channel, mut body) = (Channel::new(&mut link), Vec::new());
        let due = |kind| matches!(kind, Kind::Join | Kind::Query);
        let out_of_turn = |found| Fault::OutOfTurn { found, when: "when a stream was to join" };
        match channel.receive_if(due, &mut body)?.map_err(out_of_turn)? {
            Frame::Join(Join { session, stream }) if session == self.session && missing.contains(&stream) => {
                missing.retain(|&other| other != stream);
                self.hire(scope, link, stream).map_err(|error| Fault::Link(error.into()))
            }
            Frame::Query { session, claims } => {
                let claim = verdict(session, claims, self.claims)?;
                channel.send(&Frame::Verdict(claim)).map_err(Fault::Link)
            }
            other => Err(out_of_turn(other.kind())),
        }
    }

    /// Gives a stream its thread.
    fn hire<'scope>(&self, scope: &'scope Scope<'scope, '_>, mut link: L, stream: u16) -> io::Result<()>
    where
        'a: 'scope,
    {
        let cutter = link.cutter()?;
        self.cutters.lock().unwrap_or_else(PoisonError::into_inner).push(cutter);
        let (intake, thread) = (Arc::clone(&self.intake), self.further.thread);
        let (clock, patience) = (self.clock, self.patience);
        let serve = move || {
            thread();
            link.set_patience(patience);
            let mut worker = Worker {
                intake: &intake,
                stream,
                channel: Channel::new(&mut link),
                body: Vec::new(),
                buffers: Buffers::default(),
                clock,
                patience,
                share: PageCounts::default(),
                counted: 0,
                counted_cpu: Duration::ZERO,
            };
            if let Err(fault) = worker.serve() {
                intake.fail(fault);
            }
        };
        Builder::new().name(format!("stream-{stream}")).spawn_scoped(scope, serve)?;
        Ok(())
    }
}

/// One further stream.
struct Worker<'a, 'l, L, M> {
    intake: &'a Intake<M>,
    stream: u16,
    channel: Channel<'l, L>,
    body: Vec<u8>,
    buffers: Buffers,
    clock: &'a dyn Clock,
    patience: Duration,
    /// What it has brought in the round under way.
    share: PageCounts,
    /// Bytes that are in the common account.
    counted: u64,
    /// Processor time of this thread that is, too.
    counted_cpu: Duration,
}

impl<L: Link, M: GuestPages> Worker<'_, '_, L, M> {
    fn serve(&mut self) -> Result<(), Fault> {
        // Between frames it may be silent for as long as the first stream is not.
        while !self.intake.is_closed() {
            if self.channel.link().wait(TICK).map_err(Fault::Link)? && !self.step()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Takes one frame. `false` if nothing more is expected.
    fn step(&mut self) -> Result<bool, Fault> {
        let due = |kind| matches!(kind, Kind::Pages | Kind::RoundEnd);
        let out_of_turn = |found| Fault::OutOfTurn { found, when: "on a further stream" };
        match self.channel.receive_if(due, &mut self.body)?.map_err(out_of_turn)? {
            Frame::Pages(pages) => {
                self.intake.take(pages.records, &mut self.share)?;
                let link = self.channel.link();
                let mut idle = |bell: &Bell, seen, limit| link.idle(bell, seen, limit);
                let wait = Wait { clock: self.clock, limit: self.patience, idle: &mut idle };
                install(self.intake, pages, &mut self.buffers, wait)?;
                receive_raw(self.intake, pages.records, &mut self.buffers, &mut self.channel)?;
                self.count();
                Ok(true)
            }
            Frame::RoundEnd(end) => {
                self.count();
                let (share, transcript) = (std::mem::take(&mut self.share), self.channel.received());
                self.intake.end_round(self.stream, end, share, transcript, self.channel.link())
            }
            other => Err(out_of_turn(other.kind())),
        }
    }

    fn count(&mut self) {
        let (bytes, cpu) = (self.channel.bytes(), self.clock.thread_cpu());
        self.intake.count(bytes - self.counted, cpu - self.counted_cpu);
        (self.counted, self.counted_cpu) = (bytes, cpu);
    }
}
