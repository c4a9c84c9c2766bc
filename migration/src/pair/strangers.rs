//! Peers that do not play by the rules: bytes by hand at one end, the engine at the other. Neither end panics, waits
//! for ever or lets a guest run, and both say in words what was wrong.

use super::link::{End, connect};
use super::world::{FakeGuest, FakeHost, MemoryClaims, World};
use super::{PATIENCE, Weather, plan, serve};
use crate::channel::{Channel, ChannelError};
use crate::link::{Link, LinkError};
use crate::progress::Unobserved;
use crate::source::{self, Failed, Further, Outcome, SourceError, Surroundings};
use crate::target::Fault;
use crate::wire::{Frame, FrameError, HEADER_BYTES, Header, Hello, Kind, MAX_STATE, Running, Transfer};
use crate::{CancelToken, Claim, Clock, Mode};
use proptest::prelude::*;
use std::time::Duration;
use uuid::Uuid;

fn encoded(frame: &Frame<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    bytes
}

/// Sends bytes to a target, and hangs up; returns the fault and the last words of the target.
fn to_target(bytes: &[u8]) -> (Fault, Option<(Kind, String)>) {
    let (mut near, far, [_, far_clock], door) = connect(Weather::default(), &CancelToken::new());
    std::thread::scope(|scope| {
        let target = scope.spawn(move || {
            let world = World::new();
            let mut host = FakeHost::new(&world);
            let (arrival, _) = serve(far, &mut host, &MemoryClaims::default(), &far_clock, &door);
            assert_eq!(host.abandoned.is_some(), host.prepared);
            arrival.expect_err("no guest came")
        });
        near.send(bytes, &[]).unwrap();
        let words = last_words(&mut near);
        drop(near);
        (target.join().unwrap(), words)
    })
}

/// The reason that the other end gives, if it gives one.
fn last_words(link: &mut End) -> Option<(Kind, String)> {
    link.set_patience(PATIENCE * 3);
    let (mut channel, mut body) = (Channel::new(link), Vec::new());
    loop {
        match channel.receive(&mut body) {
            Ok(Frame::Abort { reason }) => return Some((Kind::Abort, reason.to_owned())),
            Ok(Frame::Refuse { reason }) => return Some((Kind::Refuse, reason.to_owned())),
            Ok(_) => {}
            Err(ChannelError::Link(LinkError::Closed | LinkError::TimedOut { .. })) => return None,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_stranger_is_told_that_this_is_no_web_server() {
    let (fault, words) = to_target(b"GET / HTTP/1.1\r\nHost: target\r\n\r\n");
    assert!(matches!(fault, Fault::Frame(FrameError::NotOurs { .. })), "{fault}");
    let (kind, words) = words.unwrap();
    assert_eq!(kind, Kind::Abort);
    assert!(words.contains("does not speak Godwit's migration protocol"), "{words}");
}

#[test]
fn another_version_is_told_both_versions() {
    let mut hello = encoded(&Frame::Ready);
    hello[4] = 5;
    let (fault, words) = to_target(&hello);
    assert!(matches!(fault, Fault::Frame(FrameError::Version { found: 5 })), "{fault}");
    let (_, words) = words.unwrap();
    assert!(words.contains("speaks version 5") && words.contains("this end version 4"), "{words}");
}

#[test]
fn a_length_over_its_bound_is_not_waited_for() {
    let mut state = encoded(&Frame::State(b""));
    state[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let (fault, words) = to_target(&state);
    assert!(matches!(fault, Fault::Frame(FrameError::Length { kind: Kind::State, .. })), "{fault}");
    assert!(words.is_some());
}

/// Of 64 streams, each might announce 64 MiB.
#[test]
fn no_room_is_made_for_a_frame_that_is_not_due() {
    let (mut near, mut far, _, _) = connect(Weather::default(), &CancelToken::new());
    let mut state = encoded(&Frame::State(b""));
    state[8..12].copy_from_slice(&u32::try_from(MAX_STATE).unwrap().to_le_bytes());
    near.send(&state, &[]).unwrap();
    let mut body = Vec::new();
    let frame = Channel::new(&mut far).receive_if(|kind| kind == Kind::Join, &mut body);
    assert_eq!(frame.unwrap().unwrap_err(), Kind::State, "it does not wait for the body");
    assert_eq!(body.capacity(), 0);
}

#[test]
fn silence_in_the_middle_of_a_frame_ends() {
    for length in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 5] {
        let bytes = &encoded(&Frame::Query { session: Uuid::nil(), claims: Uuid::nil() })[..length];
        let (fault, _) = to_target(bytes);
        assert!(matches!(fault, Fault::Link(LinkError::TimedOut { .. })), "{length}: {fault}");
    }
}

/// Runs a source against a target that sends these frames once the source has said something, whatever that is.
fn to_source(answers: &[Vec<u8>]) -> Outcome<FakeGuest> {
    let world = World::new();
    let cancel = CancelToken::new();
    let (mut near, mut far, [near_clock, far_clock], door) = connect(Weather::default(), &cancel);
    let answers = answers.to_vec();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            far.wait(PATIENCE).unwrap();
            for answer in answers {
                far.send(&answer, &[]).unwrap();
            }
            far_clock.sleep(PATIENCE * 10);
            drop(far);
        });
        let around = Surroundings { clock: &near_clock, cancel: &cancel, observer: &mut Unobserved };
        let further = Further { dial: &mut |_| door.dial(), thread: &|| {} };
        let outcome = source::run(FakeGuest::new(&world), &mut near, &plan(Mode::Live), around, further);
        drop(near);
        outcome
    })
}

fn failure(answers: &[Vec<u8>]) -> SourceError {
    let outcome = to_source(answers);
    let Outcome::StillOurs(Failed { cause, guest, stuck: None }) = outcome else { panic!("{outcome:?}") };
    assert!(guest.world.facts().runs_at_source);
    cause
}

#[test]
fn a_target_that_answers_out_of_turn_does_not_get_the_guest() {
    let accept = encoded(&Frame::Accept { claims: Uuid::nil(), transfer: Transfer::Copied, old: 0 });
    for wrong in [
        Frame::Ready,
        Frame::Running(Running { restore: Duration::ZERO, start: Duration::ZERO, cpu: Duration::ZERO }),
        Frame::Report(b"{}"),
        Frame::Verdict(Claim::Mine),
        Frame::Go,
        Frame::State(b"mine"),
        Frame::Query { session: Uuid::nil(), claims: Uuid::nil() },
    ] {
        let cause = failure(&[encoded(&wrong)]);
        assert!(matches!(cause, SourceError::OutOfTurn { .. }), "{wrong:?} for Accept: {cause}");
        let cause = failure(&[accept.clone(), encoded(&wrong)]);
        assert!(matches!(cause, SourceError::OutOfTurn { .. }), "{wrong:?} after Accept: {cause}");
    }
    let cause = failure(&[accept.clone(), accept]);
    assert!(matches!(cause, SourceError::OutOfTurn { found: Kind::Accept, .. }), "{cause}");
}

#[test]
fn a_target_that_has_memory_which_was_not_passed_does_not_get_the_guest() {
    let accept = Frame::Accept { claims: Uuid::nil(), transfer: Transfer::Passed, old: 0 };
    let cause = failure(&[encoded(&accept)]);
    assert!(matches!(cause, SourceError::NeverPassed), "{cause}");
}

#[test]
fn a_target_of_another_version_is_understood_when_it_refuses() {
    let mut refusal = encoded(&Frame::Refuse { reason: "I speak version 7 only" });
    refusal[4] = 7;
    let checked = crc32c::crc32c_append(crc32c::crc32c(&refusal[..12]), &refusal[HEADER_BYTES..]);
    refusal[12..16].copy_from_slice(&checked.to_le_bytes());
    assert!(Header::parse(refusal[..HEADER_BYTES].try_into().unwrap()).is_ok());
    assert_eq!(failure(&[refusal]).to_string(), "The target refused the guest: I speak version 7 only");
}

#[test]
fn something_else_behind_the_address_is_named() {
    let cause = failure(&[b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()]);
    assert!(matches!(cause, SourceError::Frame(FrameError::NotOurs { .. })), "{cause}");
}

#[test]
fn a_target_that_shows_life_but_never_answers_is_not_waited_for_for_ever() {
    let alive = vec![encoded(&Frame::Heartbeat); 50];
    assert!(matches!(failure(&alive), SourceError::Link(LinkError::TimedOut { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn noise_at_the_target_is_a_fault(noise in prop::collection::vec(any::<u8>(), 0..200), hello in any::<bool>()) {
        let regions = super::world::REGIONS.to_vec();
        let (session, vm) = (Uuid::from_u128(8), Uuid::nil());
        let (mode, transfer) = (Mode::Live, Transfer::Copied);
        let offer = Hello { session, vm, mode, verify: false, streams: 1, transfer, build: "x", regions, machine: b"" };
        let mut bytes = if hello { encoded(&Frame::Hello(offer)) } else { Vec::new() };
        bytes.extend(noise);
        to_target(&bytes);
    }

    #[test]
    fn noise_at_the_source_leaves_the_guest(noise in prop::collection::vec(any::<u8>(), 1..200), accept in any::<bool>()) {
        let accept = accept.then_some(Frame::Accept { claims: Uuid::nil(), transfer: Transfer::Copied, old: 0 });
        let accepted = accept.as_ref().map(encoded);
        failure(&accepted.into_iter().chain([noise]).collect::<Vec<_>>());
    }
}
