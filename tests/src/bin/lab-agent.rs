//! Init of a lab machine; see [`godwit_tests::agent`].

fn main() -> std::process::ExitCode {
    godwit_tests::agent::main()
}
