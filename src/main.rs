//! Arguments to a command to an exit code; everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    sluice::cli::run(std::env::args_os())
}
