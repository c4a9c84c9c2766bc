//! The verifier's program; see the library for what it does.
//!
//! Exit status: 0 if the last report is good, 1 if it is not or the run failed, 2 for a wrong command line.

use std::io;
use std::process::ExitCode;

use verifier::options::{HELP, Options};
use verifier::session;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("verifier: {error}");
            return ExitCode::from(2);
        }
    };
    match session::run(&options, io::stdin(), io::stdout()) {
        Ok(report) if report.ok => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("verifier: {error:#}");
            ExitCode::FAILURE
        }
    }
}
