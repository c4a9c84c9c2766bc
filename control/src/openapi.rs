//! The description of the API for others, as it is served and as it lies in the repository.
//!
//! It is written by hand, for people; the tests hold it against the table of routes and the types.

/// `openapi.json`, OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("../openapi.json");

#[cfg(test)]
mod tests;
