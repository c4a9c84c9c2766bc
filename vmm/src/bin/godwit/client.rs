//! The commands that ask a running Godwit one thing.

use crate::UsageError;
use crate::args::{BalloonArgs, Client as Place, Pulse, ResizeDiskArgs, Resolve, Status};
use crate::show;
use anyhow::bail;
use control::{Client, Reply, Request, ResizeDisk, ResolveMigration, SetBalloon};

/// Asks the Godwit at `place`.
pub(crate) fn ask(place: &Place, request: &Request) -> anyhow::Result<Reply> {
    Ok(Client::new(&place.api).call(request)?)
}

fn order(place: &Place, request: &Request) -> anyhow::Result<u8> {
    ask(place, request).map(|_| 0)
}

pub(crate) fn pause(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::Pause)
}

pub(crate) fn resume(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::Resume)
}

pub(crate) fn kill(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::Kill)
}

pub(crate) fn reset(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::Reset)
}

pub(crate) fn power_button(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::PowerButton)
}

pub(crate) fn cancel(place: &Place) -> anyhow::Result<u8> {
    order(place, &Request::CancelMigration)
}

pub(crate) fn resolve(resolve: &Resolve) -> anyhow::Result<u8> {
    order(&resolve.client, &Request::ResolveMigration(ResolveMigration { owner: resolve.owner.into() }))
}

pub(crate) fn metrics(place: &Place) -> anyhow::Result<u8> {
    print!("{}", Client::new(&place.api).metrics()?);
    Ok(0)
}

pub(crate) fn status(status: &Status) -> anyhow::Result<u8> {
    let (vm, migration) = (ask(&status.client, &Request::ShowVm)?, ask(&status.client, &Request::ShowMigration)?);
    let (Reply::Vm(vm), Reply::Migration(last)) = (vm, migration) else { bail!(UNEXPECTED) };
    if status.json {
        show::json(&serde_json::json!({ "vm": vm, "migration": last.migration }))
    } else {
        show::vm(&vm);
        if let Some(migration) = &last.migration {
            show::migration(migration);
        }
        Ok(0)
    }
}

pub(crate) fn disks(status: &Status) -> anyhow::Result<u8> {
    let Reply::Disks(list) = ask(&status.client, &Request::ListDisks)? else { bail!(UNEXPECTED) };
    if status.json {
        return show::json(&list);
    }
    show::disks(&list);
    Ok(0)
}

pub(crate) fn resize_disk(resize: &ResizeDiskArgs) -> anyhow::Result<u8> {
    let ResizeDiskArgs { client, id, size } = resize;
    order(client, &Request::ResizeDisk(ResizeDisk { id: id.clone(), bytes: *size }))
}

pub(crate) fn nics(status: &Status) -> anyhow::Result<u8> {
    let Reply::Nics(list) = ask(&status.client, &Request::ListNics)? else { bail!(UNEXPECTED) };
    if status.json {
        return show::json(&list);
    }
    show::nics(&list);
    Ok(0)
}

pub(crate) fn balloon(balloon: &BalloonArgs) -> anyhow::Result<u8> {
    let BalloonArgs { read: Status { client, json }, target } = balloon;
    if let Some(target_bytes) = *target {
        if *json {
            return Err(UsageError("--target changes the balloon and prints nothing; leave --json out".into()).into());
        }
        return order(client, &Request::SetBalloon(SetBalloon { target_bytes }));
    }
    let Reply::Balloon(info) = ask(client, &Request::ShowBalloon)? else { bail!(UNEXPECTED) };
    if *json {
        return show::json(&info);
    }
    show::balloon(&info);
    Ok(0)
}

pub(crate) fn pulse(pulse: &Pulse) -> anyhow::Result<u8> {
    let Pulse { read: Status { client, json }, times } = pulse;
    let Reply::Pulsed(pulsed) = ask(client, &Request::Pulse(control::Pulse { times: *times }))? else {
        bail!(UNEXPECTED)
    };
    if *json {
        return show::json(&pulsed);
    }
    println!("{} pulses, {} bytes of state, the longest {}", pulsed.times, pulsed.state_bytes, pulsed.longest_ms);
    Ok(0)
}

/// The server's replies are matched to their requests by the client library.
const UNEXPECTED: &str = "The reply is not one to this request, which is a bug in godwit";
