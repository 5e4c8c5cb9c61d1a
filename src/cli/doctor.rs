//! `sluice doctor`: what this machine lacks for lazy images, and what to do about it.
//!
//! Owns the order of the checks and the table. Changes nothing on the machine; the reading is in
//! `system`, the judging in `kernel_checks` and `host_checks`. Exits with 1 if a check failed.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use serde_json::json;

use super::output::Output;
use super::system::Machine;
use super::{Daemon, Verdict, host_checks, kernel_checks};
use crate::error::Result;

/// The options of `sluice doctor`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice doctor\n  \
    sluice doctor --cache /data/sluice --json\n\n\
    Exit code 0: images can be served. 1: something marked FAIL is in the way.")]
pub struct Options {
    /// The directory of the cache to judge, for the fanotify door.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sluice")]
    cache: PathBuf,
    /// The directory of the kernel's own cache to judge, for the cachefiles door.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sluice/fscache")]
    fscache: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// How bad it is, mildest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Worth knowing, nothing to do.
    Info,
    /// As it should be.
    Ok,
    /// Works, with a limitation or not for long.
    Warn,
    /// Images cannot be served until this is changed.
    Fail,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What is so.
    pub found: String,
    /// What to do; empty when nothing is.
    pub advice: String,
}

/// Looks at everything and prints it.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let (fscache, cache) = (Some(&*options.fscache), Some(&*options.cache));
    let machine = Machine::read(fscache, cache, &options.daemon.api());
    let findings = examine(&machine);
    let failed = findings.iter().filter(|finding| finding.level == Level::Fail).count();
    if options.json {
        out.json(&json!({ "ok": failed == 0, "checks": findings }))?;
    } else {
        print(&findings, failed, out)?;
    }
    Ok(if failed == 0 { Verdict::Good } else { Verdict::Bad })
}

/// A finding; `advice` is empty when nothing needs doing.
pub fn finding(
    check: &'static str,
    level: Level,
    found: impl Into<String>,
    advice: &str,
) -> Finding {
    Finding { check, level, found: found.into(), advice: advice.to_owned() }
}

fn print(findings: &[Finding], failed: usize, out: &mut Output) -> Result<()> {
    for Finding { check, level, found, advice } in findings {
        let mark = match level {
            Level::Info => "info",
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        out.line(format!("{mark:<4}  {check:<18}  {found}"))?;
        if !advice.is_empty() {
            out.line(format!("{:<4}  {:<18}  -> {advice}", "", ""))?;
        }
    }
    match failed {
        0 => out.line("\nThis machine can serve lazy images."),
        1 => out.line("\nOne thing is in the way of lazy images."),
        count => out.line(format!("\n{count} things are in the way of lazy images.")),
    }
}

/// Every check, in the order an operator would fix things. One door is enough: what is in the way
/// of the other is no failure then.
fn examine(machine: &Machine) -> Vec<Finding> {
    let status = machine.status.as_deref().unwrap_or("");
    let mut cachefiles = cachefiles_door(machine);
    let mut fanotify = kernel_checks::fanotify(&machine.fanotify);
    let usable = cachefiles.iter().all(|finding| finding.level != Level::Fail);
    let doors = (machine.fanotify.is_good(), usable);
    for (door, other_works) in [(&mut fanotify, doors.1), (&mut cachefiles, doors.0)] {
        let fails = door.iter_mut().filter(|finding| finding.level == Level::Fail);
        fails.filter(|_| other_works).for_each(|finding| finding.level = Level::Info);
    }
    let mut findings = vec![erofs(machine), kernel_checks::doors(doors.0, doors.1)];
    findings.extend(fanotify);
    findings.extend(cachefiles);
    findings.extend([
        host_checks::page_size(machine.page_size_bytes),
        host_checks::privileges(status, machine.uid_map.as_deref()),
        host_checks::open_files(machine.limits.as_deref(), status),
        host_checks::locked_memory(machine.limits.as_deref(), status),
        host_checks::io_uring(&machine.ring, machine.io_uring_disabled.as_deref()),
        kernel_checks::daemon(&machine.daemon),
    ]);
    findings
}

fn erofs(machine: &Machine) -> Finding {
    kernel_checks::erofs(machine.filesystems.as_deref(), machine.modules_available.as_deref())
}

fn cachefiles_door(machine: &Machine) -> Vec<Finding> {
    let mut findings = vec![
        kernel_checks::kernel(&machine.release),
        kernel_checks::kernel_options(machine.kernel_config.as_deref()),
        kernel_checks::device(&machine.device, machine.modules_available.as_deref()),
        kernel_checks::holders(&machine.holders),
        kernel_checks::cachefilesd(&machine.cachefilesd),
    ];
    if let Some(cache) = &machine.cache {
        findings.extend([
            host_checks::file_system(cache),
            host_checks::direct_io(cache),
            host_checks::space(cache),
        ]);
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_nothing_is_known_of_fails_and_every_failure_says_what_to_do() {
        let findings = examine(&Machine::default());
        assert!(findings.iter().any(|finding| finding.level == Level::Fail));
        for finding in findings.iter().filter(|finding| finding.level == Level::Fail) {
            assert!(!finding.advice.is_empty(), "{finding:?}");
        }
    }

    #[test]
    fn one_door_is_enough() {
        use crate::upcall::probe;
        let good = probe::Finding { check: "x", is_good: true, text: String::new() };
        let fanotify = probe::Report { findings: vec![good], reads_directly: false };
        let machine = Machine { fanotify, ..Machine::default() };
        let findings = examine(&machine);
        let device = findings.iter().find(|finding| finding.check == "/dev/cachefiles");
        let device = device.expect("it is looked at");
        assert_eq!((device.level, device.advice.is_empty()), (Level::Info, false));
        let doors =
            findings.iter().find(|finding| finding.check == "doors").expect("they are told");
        assert_eq!((doors.level, doors.found.as_str()), (Level::Ok, "fanotify"));
    }

    #[test]
    fn an_ok_asks_for_nothing() {
        let findings =
            examine(&Machine::read(None, None, &super::super::client::Api::new("/x".into())));
        for finding in findings.iter().filter(|finding| finding.level == Level::Ok) {
            assert_eq!(finding.advice, "", "{finding:?}");
        }
    }
}
