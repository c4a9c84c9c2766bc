//! The migration engine's world: a guest on KVM that leaves or arrives, sockets, and the record of ownership.

pub mod address;
pub mod arriving;
pub mod claims;
pub mod feasibility;
mod handle;
pub mod leaving;
pub mod lending;
pub mod link;
pub mod mirror;
pub mod mirrored;
pub mod offer;
pub mod ownership;
pub mod pages;
mod tcp;
