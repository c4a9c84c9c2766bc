//! A channel to an export: one connection, and what to do when there is none.
//!
//! ```text
//!         dialled                     broken off, silent for too long
//! Down ------------> Up ------------------------------------------------> Down
//!                     | the server breaks the protocol
//!                     '--------------------------------> Failed (for good)
//! ```
//!
//! While it is down the dialler is asked again and again, less often as time goes by. All is driven by
//! [`Channel::commit`] and [`Channel::reap`] on the caller's thread, which never waits.

use super::connection::{Connection, Loss};
use super::dialler::{Call, Connected, Dialler};
use super::haggling::Agreement;
use super::ledger::Ledger;
use super::{Place, Shared};
use crate::backend::{Channel, Completion, Operation};
use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two attempts to connect: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Whose descriptor is ready is not looked at: all are few, and asked in turn.
const ANY: epoll::EventData = epoll::EventData::new_u64(0);

#[derive(Debug)]
enum State {
    Up { connection: Box<Connection>, waits_to_send: bool },
    Down(Down),
    Failed(String),
}

#[derive(Debug)]
struct Down {
    since: Instant,
    attempts: u32,
    /// The call that is not answered yet.
    call: Option<Arc<Call>>,
    /// When the next one is due.
    next: Instant,
}

#[derive(Debug)]
pub(super) struct NbdChannel {
    shared: Arc<Shared>,
    /// Held as long as the channel is open.
    _place: Place,
    dialler: Arc<Dialler>,
    /// What was agreed on last; requests are planned by it.
    agreement: Agreement,
    ledger: Ledger,
    state: State,
    events: OwnedFd,
    timer: OwnedFd,
    /// When the timer goes off, if it is set.
    alarm: Option<Instant>,
    /// Connections that were lost since one has brought an answer.
    losses: u32,
}

impl NbdChannel {
    /// A channel on the connection `first`, or on one that is being dialled when this returns.
    pub(super) fn open(
        place: Place,
        dialler: &Arc<Dialler>,
        agreement: Agreement,
        first: Option<Connected>,
    ) -> io::Result<Self> {
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        epoll::add(&events, &timer, ANY, epoll::EventFlags::IN)?;
        let now = Instant::now();
        let down = Down { since: now, attempts: 0, call: None, next: now };
        let mut channel = Self {
            shared: Arc::clone(&place.0),
            _place: place,
            dialler: Arc::clone(dialler),
            agreement,
            ledger: Ledger::default(),
            state: State::Down(down),
            events,
            timer,
            alarm: None,
            losses: 0,
        };
        match first {
            Some(connected) => channel.go_up(connected)?,
            None => channel.dial(),
        }
        Ok(channel)
    }

    fn go_up(&mut self, connected: Connected) -> io::Result<()> {
        self.agreement = connected.agreement;
        let mut connection = Box::new(Connection::new(connected));
        epoll::add(&self.events, &*connection, ANY, epoll::EventFlags::IN)?;
        for key in self.ledger.begin_again() {
            connection.post(&mut self.ledger, key);
        }
        self.state = State::Up { connection, waits_to_send: false };
        Ok(())
    }

    /// Sends and receives what there is, connects and gives up as it is due.
    fn turn(&mut self) {
        self.hear_alarm();
        if let State::Down(_) = self.state {
            self.look_after_call();
        }
        if let State::Up { .. } = self.state {
            match self.exchange() {
                Ok(()) => self.look_at_clock(),
                Err(loss) => self.lose(loss),
            }
        }
        if let State::Failed(why) = &self.state {
            self.ledger.fail(|| io::Error::other(why.clone()));
        }
    }

    fn exchange(&mut self) -> Result<(), Loss> {
        let State::Up { connection, .. } = &mut self.state else { return Ok(()) };
        connection.receive(&mut self.ledger)?;
        self.transmit()
    }

    fn transmit(&mut self) -> Result<(), Loss> {
        let State::Up { connection, waits_to_send } = &mut self.state else { return Ok(()) };
        let waits = connection.send()?;
        if waits != *waits_to_send {
            *waits_to_send = waits;
            let interest = if waits { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN };
            epoll::modify(&self.events, &**connection, ANY, interest).map_err(|error| Loss::Broken(error.into()))?;
        }
        Ok(())
    }

    /// Gives a connection up whose server has been silent for too long.
    fn look_at_clock(&mut self) {
        let (Some(within), Some(oldest)) = (self.shared.options.fail_after, self.ledger.oldest()) else { return };
        let due = oldest + within;
        if due <= Instant::now() {
            self.lose(Loss::Broken(io::ErrorKind::TimedOut.into()));
        } else if self.alarm.is_none() {
            self.set_alarm(due);
        }
    }

    fn lose(&mut self, loss: Loss) {
        let address = &self.shared.uri;
        match loss {
            Loss::Violation(how) => {
                tracing::error!(export = %address, how, "The NBD server breaks the protocol; the disk fails");
                self.state = State::Failed(format!("The NBD server breaks the protocol: {how}"));
            }
            Loss::Broken(error) => {
                tracing::warn!(export = %address, %error, "The connection to the NBD server is lost; connecting again");
                let now = Instant::now();
                // What has waited for an answer has waited for a connection, too.
                let since = self.ledger.oldest().map_or(now, |oldest| oldest.min(now));
                if let State::Up { connection, .. } = &self.state {
                    connection.break_off();
                }
                // A server that takes clients in and hangs up on each is not asked without a pause.
                let next = if self.losses == 0 { now } else { now + pause(self.losses - 1) };
                self.losses = self.losses.saturating_add(1);
                self.state = State::Down(Down { since, attempts: 0, call: None, next });
                self.look_after_call();
            }
        }
    }

    fn dial(&mut self) {
        let State::Down(down) = &mut self.state else { return };
        let begun = Call::new().and_then(|call| {
            epoll::add(&self.events, call.answered(), ANY, epoll::EventFlags::IN)?;
            Ok(call)
        });
        match begun {
            Ok(call) => {
                self.dialler.dial(&call);
                down.call = Some(call);
            }
            Err(error) => {
                tracing::warn!(%error, "No descriptor is left to connect with");
                down.next = Instant::now() + LONGEST_PAUSE;
            }
        }
    }

    /// Takes a new connection that has come about, or asks for one, and fails requests for which it is too late.
    fn look_after_call(&mut self) {
        let State::Down(down) = &mut self.state else { return };
        let now = Instant::now();
        match down.call.as_ref().and_then(|call| call.take()) {
            Some(Ok(connected)) => {
                tracing::info!(export = %self.shared.uri, after = ?(now - down.since), "Connected to the NBD server");
                if let Err(error) = self.go_up(connected) {
                    self.lose(Loss::Broken(error));
                }
                return;
            }
            Some(Err(error)) => {
                if down.attempts == 0 {
                    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                    tracing::warn!(export = %self.shared.uri, "{error}{cause}; trying again");
                }
                down.next = now + pause(down.attempts);
                down.attempts += 1;
                down.call = None;
            }
            None => {}
        }
        let (since, is_due) = (down.since, down.call.is_none() && down.next <= now);
        if is_due {
            self.dial();
        }
        let gives_up = self.shared.options.fail_after.map(|within| since + within);
        if gives_up.is_some_and(|at| at <= now) {
            self.ledger.fail(|| io::ErrorKind::TimedOut.into());
        }
        let State::Down(down) = &self.state else { return };
        let next = down.call.is_none().then_some(down.next);
        let alarm = [next, gives_up.filter(|&at| at > now)].into_iter().flatten().min();
        if let Some(at) = alarm {
            self.set_alarm(at);
        }
    }

    fn set_alarm(&mut self, at: Instant) {
        let left = at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let value =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            Ok(_) => self.alarm = Some(at),
            Err(error) => tracing::error!(%error, "A disk's timer cannot be set"),
        }
    }

    fn hear_alarm(&mut self) {
        if self.alarm.is_some_and(|at| at <= Instant::now()) {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            self.alarm = None;
        }
    }
}

impl Channel for NbdChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        let refusal = operation.check(self.agreement.size).err();
        let may_not = || if operation.writes() { self.shared.permits_writes().err() } else { None };
        if let Some(refused) = refusal.or_else(may_not) {
            return self.ledger.refuse(tag, refused);
        }
        let keys = self.ledger.take_on(tag, operation, &self.agreement);
        if let State::Up { connection, .. } = &mut self.state {
            for key in keys {
                connection.post(&mut self.ledger, key);
            }
        }
    }

    fn commit(&mut self) {
        if let Err(loss) = self.transmit() {
            self.lose(loss);
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.turn();
        let before = done.len();
        self.ledger.reap(done);
        if matches!(self.state, State::Up { .. }) && done.len() > before {
            self.losses = 0;
        }
    }

    fn in_flight(&self) -> usize {
        self.ledger.in_flight()
    }
}

impl Drop for NbdChannel {
    fn drop(&mut self) {
        if let State::Up { connection, .. } = &mut self.state {
            connection.hang_up();
        }
    }
}

/// How long to wait after so many attempts.
fn pause(attempts: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << attempts.min(10)).min(LONGEST_PAUSE)
}
