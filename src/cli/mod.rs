//! The command line: one file per command, each of which prints, asks and shows progress.
//!
//! Owns the arguments, the exit codes (0 done, 1 not done or something bad was found, 2 the
//! arguments make no sense) and what a person reads. Never decides about bytes: that is
//! the business of the rooms below.

mod blobs;
mod bootstraps;
mod build;
mod check;
mod client;
mod convert;
mod daemon;
mod diff;
mod docker_daemon;
mod docker_plugin;
mod doctor;
mod fetch;
mod gc;
mod host_checks;
mod images;
mod inspect;
mod keeper;
mod kernel_checks;
mod mount;
mod mounts;
mod optimize;
mod output;
mod progress;
mod pull;
mod snapshotter;
mod source;
mod stat;
mod structure;
mod system;
mod trace;
mod umount;
mod unpack;
mod verify;

pub use daemon::{cores_allowed, parse_cores};

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config;
use crate::error::Result;
use output::Output;

/// What a command found, as an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Done, and nothing is wrong.
    Good,
    /// Done, and what was looked at is not as it should be.
    Bad,
    /// Nothing was done: the arguments make no sense, and that has been said.
    Misuse,
}

/// The arguments after the program's name.
#[derive(Parser)]
#[command(
    name = "sluice",
    version,
    about = "Containers start before their image has been downloaded",
    after_help = "A first image, lazily:\n  \
        sluice doctor\n  \
        sluice daemon &\n  \
        sluice mount registry.example/team/app:1.0-nydus /mnt\n  \
        sluice stat\n  \
        sluice umount /mnt"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the kernel's requests until told to stop.
    Daemon(daemon::Options),
    /// Do the same with nydusd's options (also when started under the name nydusd).
    #[command(disable_help_flag = true)]
    Singleton {
        /// The options of `nydusd singleton`; `--help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Mount an image from a registry; its bytes arrive when somebody reads them.
    Mount(mount::Options),
    /// Unmount an image and let the daemon forget it.
    Umount(umount::Options),
    /// List what the daemon serves.
    Images(images::Options),
    /// Give back the bytes that no mounted image uses.
    Gc(gc::Options),
    /// Show the daemon's counters and latencies.
    Stat(stat::Options),
    /// Make an image lazily loadable, from any place to any other.
    Convert(convert::Options),
    /// Show what a mounted image needed at its starts, for `sluice optimize`.
    Trace(trace::Options),
    /// Put what a recorded start needs in front of an image.
    Optimize(optimize::Options),
    /// Show what differs between two images.
    Diff(diff::Options),
    /// Show what is in an image.
    Inspect(inspect::Options),
    /// Verify an image's structure and the digest of every chunk.
    Check(check::Options),
    /// Make an image out of a directory.
    Build(build::Options),
    /// Restore an image into a directory.
    Unpack(unpack::Options),
    /// Serve Docker as a graphdriver: images are loaded lazily or unpacked, as they are.
    DockerPlugin(docker_plugin::Options),
    /// Make an image known to containerd without fetching its blobs.
    Pull(pull::Options),
    /// Keep containerd's snapshots; images are loaded lazily.
    Snapshotter(snapshotter::Options),
    /// Find out what this machine lacks, and say what to do.
    Doctor(doctor::Options),
    /// Hold open files for a daemon; daemons start this by themselves.
    #[command(hide = true)]
    Keeper(keeper::Options),
    /// Print the version.
    Version,
}

/// Which daemon to talk to.
#[derive(Args, Clone, Debug)]
struct Daemon {
    /// The daemon's control socket.
    #[arg(long, value_name = "PATH", default_value = config::API_SOCKET_DEFAULT)]
    apisock: PathBuf,
}

impl Daemon {
    fn api(&self) -> client::Api {
        client::Api::new(self.apisock.clone())
    }
}

/// Runs one command line, program name first, and says how the process shall end.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if called_nydusd(&arguments) {
        return exit_code(daemon::run_nydusd(&arguments[1..]));
    }
    match Arguments::try_parse_from(arguments) {
        Ok(arguments) => exit_code(dispatch(arguments.command)),
        // Help and version go to standard output with 0, misuse to standard error with 2. A reader
        // that hung up is no news.
        Err(error) => {
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}

fn dispatch(command: Command) -> Result<Verdict> {
    let mut out = Output::stdout();
    let verdict = match command {
        Command::Daemon(options) => daemon::run(&options),
        Command::Singleton { arguments } => daemon::run_nydusd(&arguments),
        Command::Mount(options) => mount::run(&options, &mut out),
        Command::Umount(options) => umount::run(&options, &mut out),
        Command::Images(options) => images::run(&options, &mut out),
        Command::Gc(options) => gc::run(&options, &mut out),
        Command::Stat(options) => stat::run(&options, &mut out),
        Command::Convert(options) => convert::run(&options, &mut out),
        Command::Trace(options) => trace::run(&options, &mut out),
        Command::Optimize(options) => optimize::run(&options, &mut out),
        Command::Diff(options) => diff::run(&options, &mut out),
        Command::Inspect(options) => inspect::run(&options, &mut out),
        Command::Check(options) => check::run(&options, &mut out),
        Command::Build(options) => build::run(&options, &mut out),
        Command::Unpack(options) => unpack::run(&options, &mut out),
        Command::DockerPlugin(options) => docker_plugin::run(&options),
        Command::Pull(options) => pull::run(&options, &mut out),
        Command::Snapshotter(options) => snapshotter::run(&options),
        Command::Doctor(options) => doctor::run(&options, &mut out),
        Command::Keeper(options) => keeper::run(&options),
        Command::Version => {
            out.line(concat!("sluice ", env!("CARGO_PKG_VERSION")))?;
            Ok(Verdict::Good)
        }
    }?;
    out.flush()?;
    Ok(verdict)
}

fn exit_code(result: Result<Verdict>) -> ExitCode {
    match result {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Bad) => ExitCode::FAILURE,
        Ok(Verdict::Misuse) => ExitCode::from(2),
        Err(error) => {
            output::complain(&format!("sluice: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Managers start nydusd by that name, often through a link and sometimes with the subcommand left
/// to us.
fn called_nydusd(arguments: &[OsString]) -> bool {
    arguments.first().and_then(|name| Path::new(name).file_name()).is_some_and(|n| n == "nydusd")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn only_the_name_nydusd_means_nydusd() {
        let called = |name: &str| called_nydusd(&[OsString::from(name)]);
        assert!(called("nydusd"));
        assert!(called("/usr/local/bin/nydusd"));
        assert!(!called("sluice"));
        assert!(!called("/opt/nydusd/sluice"));
        assert!(!called_nydusd(&[]));
    }

    #[test]
    fn singleton_takes_the_rest_as_it_is() {
        let parsed = Arguments::try_parse_from(["sluice", "singleton", "-A", "/a", "--fscache=/b"]);
        let Command::Singleton { arguments } = parsed.expect("parses").command else {
            panic!("not a singleton");
        };
        assert_eq!(arguments, ["-A", "/a", "--fscache=/b"].map(OsString::from));
    }
}
