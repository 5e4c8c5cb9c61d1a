//! What the readings of a kernel mean: its version, its options, its device and who holds it.
//!
//! Pure functions from text to a finding. Nothing here reads anything; `system` does.

use super::doctor::{Finding, Level, finding};
use super::system::{DaemonState, Device, Process};
use crate::upcall::probe::{self, Report};

/// "6.12.43-amd64" is (6, 12, 43).
fn version(release: &str) -> Option<(u32, u32, u32)> {
    let numbers = release.split(|c: char| !c.is_ascii_digit() && c != '.').next()?;
    let mut parts = numbers.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

/// The versions are those of facts about mainline; distributions may carry fixes earlier.
pub fn kernel(release: &str) -> Finding {
    let check = "kernel";
    let Some(version) = version(release) else {
        return finding(check, Level::Warn, format!("version {release:?}"), "is not understood");
    };
    let (level, advice) = match version {
        (..=4, ..) | (5, ..19, _) => {
            (Level::Fail, "lazy loading in the kernel needs Linux 5.19 or later; upgrade it")
        }
        (5, ..) | (6, 0, _) => (
            Level::Warn,
            "no shared domains (6.1), no restart without EIO (6.8), reads cannot be killed (6.10)",
        ),
        (6, ..8, _) => (
            Level::Warn,
            "open images get EIO when the daemon dies (6.8 can restore), reads cannot be killed \
             (6.10)",
        ),
        (6, ..12, _) | (6, 12, ..2) => {
            (Level::Warn, "on-demand cachefiles got many fixes in 6.12.2; upgrade if you can")
        }
        (6, ..) | (7, ..2, _) => (Level::Ok, ""),
        _ => (
            Level::Fail,
            "Linux 7.2 removed EROFS over fscache; run 5.19 to 7.1 (6.12 is well tried)",
        ),
    };
    finding(check, level, release, advice)
}

/// The options both sides of the cachefiles door need, built in or as modules.
pub fn kernel_options(config: Option<&str>) -> Finding {
    const NEEDED: [&str; 5] = [
        "CONFIG_FSCACHE",
        "CONFIG_CACHEFILES",
        "CONFIG_CACHEFILES_ONDEMAND",
        "CONFIG_EROFS_FS",
        "CONFIG_EROFS_FS_ONDEMAND",
    ];
    let check = "kernel options";
    let Some(config) = config else {
        let advice = "needs CONFIG_CACHEFILES_ONDEMAND=y and CONFIG_EROFS_FS_ONDEMAND=y; read them \
                      where your distribution keeps its configuration";
        return finding(check, Level::Warn, "no /proc/config.gz, no /boot/config-*", advice);
    };
    let missing: Vec<&str> = NEEDED.into_iter().filter(|name| !enabled(config, name)).collect();
    if missing.is_empty() {
        return finding(check, Level::Ok, "cachefiles and EROFS, both on demand", "");
    }
    let advice = "boot a kernel built with these options; tools/guest shows one that works";
    finding(check, Level::Fail, format!("without {}", missing.join(", ")), advice)
}

fn enabled(config: &str, name: &str) -> bool {
    config
        .lines()
        .any(|line| line.strip_prefix(name).is_some_and(|rest| matches!(rest.trim(), "=y" | "=m")))
}

/// Whether the kernel can mount an image at all.
pub fn erofs(filesystems: Option<&str>, modules: Option<&str>) -> Finding {
    let check = "EROFS";
    let known = filesystems.is_some_and(|text| {
        text.lines().any(|line| line.split_whitespace().last() == Some("erofs"))
    });
    if known {
        return finding(check, Level::Ok, "in /proc/filesystems", "");
    }
    match modules.is_some_and(|text| has_module(text, "erofs")) {
        true => finding(check, Level::Ok, "a module, loaded when an image is mounted", ""),
        false => finding(check, Level::Fail, "unknown to this kernel", "needs CONFIG_EROFS_FS"),
    }
}

/// Whether "/name.ko" (perhaps compressed) starts a line's path in modules.dep or modules.builtin.
fn has_module(modules: &str, name: &str) -> bool {
    let file = format!("/{name}.ko");
    modules.lines().any(|line| {
        let path = line.split(':').next().unwrap_or(line);
        path.rfind(&file).is_some_and(|at| !path[at + 1..].contains('/'))
    })
}

/// Whether a daemon could open the device.
pub fn device(device: &Device, modules: Option<&str>) -> Finding {
    let check = "/dev/cachefiles";
    let (level, found, advice) = match device {
        Device::Free => (Level::Ok, "can be opened".to_owned(), ""),
        Device::Held => (Level::Ok, "there, and in use (see holders)".to_owned(), ""),
        Device::Other => (Level::Fail, "is not a device".to_owned(), "remove what is there"),
        Device::Absent if modules.is_some_and(|text| has_module(text, "cachefiles")) => {
            (Level::Fail, "absent".to_owned(), "modprobe cachefiles")
        }
        Device::Absent => {
            (Level::Fail, "absent".to_owned(), "needs a kernel with CONFIG_CACHEFILES_ONDEMAND")
        }
        Device::Refused(libc::EBUSY) => (
            Level::Fail,
            "busy; its holder cannot be seen from here".to_owned(),
            "look from the initial pid namespace as root; it may also be a dying daemon's object",
        ),
        Device::Refused(libc::EPERM | libc::EACCES) => {
            (Level::Fail, "may not be opened".to_owned(), "run as root with CAP_SYS_ADMIN")
        }
        Device::Refused(errno) => {
            let text = std::io::Error::from_raw_os_error(*errno);
            (Level::Fail, format!("cannot be opened: {text}"), "see dmesg")
        }
    };
    finding(check, level, found, advice)
}

fn names(processes: &[Process]) -> String {
    let names: Vec<String> =
        processes.iter().map(|process| format!("{} ({})", process.name, process.pid)).collect();
    names.join(", ")
}

/// Who has the device, or an object of it that keeps an old cache bound.
pub fn holders(holders: &[Process]) -> Finding {
    let check = "holders";
    match holders {
        [] => finding(check, Level::Ok, "nobody", ""),
        _ if holders.iter().all(|process| process.is_ours) => {
            finding(check, Level::Ok, names(holders), "")
        }
        _ => {
            let advice = "the device has one opener: stop that program before `sluice daemon`";
            finding(check, Level::Fail, names(holders), advice)
        }
    }
}

/// The distribution's daemon for NFS, which wants the same device.
pub fn cachefilesd(running: &[Process]) -> Finding {
    match running {
        [] => finding("cachefilesd", Level::Ok, "not running", ""),
        _ => {
            let advice = "it takes the device; systemctl disable --now cachefilesd";
            finding("cachefilesd", Level::Fail, names(running), advice)
        }
    }
}

/// Through which of the kernel's doors images can be served; `--door auto` takes the first.
pub fn doors(fanotify: bool, cachefiles: bool) -> Finding {
    let check = "doors";
    let advice = "the lines below say what each of the two lacks; one is enough";
    match (fanotify, cachefiles) {
        (true, true) => finding(check, Level::Ok, "fanotify, cachefiles", ""),
        (true, false) => finding(check, Level::Ok, "fanotify", ""),
        (false, true) => finding(check, Level::Ok, "cachefiles", ""),
        (false, false) => finding(check, Level::Fail, "none", advice),
    }
}

/// What trying the fanotify door has shown.
pub fn fanotify(report: &Report) -> Vec<Finding> {
    let needs = "the fanotify door needs Linux 6.14 or later with CONFIG_EROFS_FS_BACKED_BY_FILE, \
                 a cache on ext4, xfs or btrfs, and root";
    let judge = |found: &probe::Finding| match found.is_good {
        true => finding(found.check, Level::Ok, found.text.clone(), ""),
        false => finding(found.check, Level::Fail, found.text.clone(), needs),
    };
    report.findings.iter().map(judge).collect()
}

/// What answers at the control socket.
pub fn daemon(state: &DaemonState) -> Finding {
    let check = "daemon";
    match state {
        DaemonState::Absent => finding(check, Level::Info, "not running", ""),
        DaemonState::Answers(state) if state == "RUNNING" => {
            finding(check, Level::Ok, "RUNNING", "")
        }
        DaemonState::Answers(state) => {
            let advice = "it waits for a takeover or a start call on its control socket";
            finding(check, Level::Warn, state.clone(), advice)
        }
        DaemonState::Silent(why) => finding(
            check,
            Level::Warn,
            why.clone(),
            "a daemon died without removing its socket; starting one replaces it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# comment\nCONFIG_FSCACHE=y\nCONFIG_CACHEFILES=m\n\
        CONFIG_CACHEFILES_ONDEMAND=y\nCONFIG_EROFS_FS=m\nCONFIG_EROFS_FS_ONDEMAND=y\n";

    #[test]
    fn releases_are_read_with_and_without_suffix() {
        assert_eq!(version("6.12.43+deb13-amd64\n"), Some((6, 12, 43)));
        assert_eq!(version("7.0-rc3"), Some((7, 0, 0)));
        assert_eq!(version("6.6"), Some((6, 6, 0)));
        assert_eq!(version(""), None);
        assert_eq!(version("six"), None);
    }

    #[test]
    fn the_door_exists_from_5_19_to_7_1() {
        let level = |release| kernel(release).level;
        assert_eq!(level("4.19.0"), Level::Fail);
        assert_eq!(level("5.18.19"), Level::Fail);
        assert_eq!(level("5.19.0"), Level::Warn);
        assert_eq!(level("6.0.9"), Level::Warn);
        assert_eq!(level("6.1.140"), Level::Warn);
        assert_eq!(level("6.12.1"), Level::Warn);
        assert_eq!(level("6.12.2"), Level::Ok);
        assert_eq!(level("7.1.99"), Level::Ok);
        assert_eq!(level("7.2.0"), Level::Fail);
        assert_eq!(level("8.0.0"), Level::Fail);
        assert_eq!(level("weird"), Level::Warn);
    }

    #[test]
    fn a_missing_option_is_named() {
        assert_eq!(kernel_options(Some(GOOD)).level, Level::Ok);
        let without =
            GOOD.replace("CONFIG_EROFS_FS_ONDEMAND=y", "# CONFIG_EROFS_FS_ONDEMAND is not set");
        let found = kernel_options(Some(&without));
        assert_eq!(found.level, Level::Fail);
        assert_eq!(found.found, "without CONFIG_EROFS_FS_ONDEMAND");
        assert_eq!(kernel_options(None).level, Level::Warn);
    }

    #[test]
    fn a_longer_option_does_not_stand_for_a_shorter_one() {
        assert!(!enabled("CONFIG_CACHEFILES_ONDEMAND=y", "CONFIG_CACHEFILES"));
        assert!(!enabled("CONFIG_CACHEFILES=n", "CONFIG_CACHEFILES"));
    }

    #[test]
    fn erofs_may_be_built_in_loaded_or_loadable() {
        let modules = "kernel/fs/erofs/erofs.ko.xz: kernel/fs/netfs/netfs.ko.xz\n";
        assert_eq!(erofs(Some("nodev\tsysfs\n\terofs\n"), None).level, Level::Ok);
        assert_eq!(erofs(Some("nodev\tsysfs\n"), Some(modules)).level, Level::Ok);
        assert_eq!(
            erofs(Some("\tsquashfs\n"), Some("kernel/a/b.ko: kernel/erofs.ko\n")).level,
            Level::Fail
        );
        assert_eq!(erofs(None, None).level, Level::Fail);
    }

    #[test]
    fn an_absent_device_asks_for_the_module_only_if_there_is_one() {
        let modules = "kernel/fs/cachefiles/cachefiles.ko: kernel/fs/netfs/netfs.ko\n";
        assert_eq!(device(&Device::Absent, Some(modules)).advice, "modprobe cachefiles");
        assert!(device(&Device::Absent, Some("kernel/x.ko:\n")).advice.contains("CONFIG_"));
        assert_eq!(device(&Device::Free, None).level, Level::Ok);
        assert!(device(&Device::Refused(libc::EPERM), None).advice.contains("root"));
        assert!(device(&Device::Refused(libc::EBUSY), None).found.contains("busy"));
        assert_eq!(device(&Device::Other, None).level, Level::Fail);
    }

    #[test]
    fn a_strange_holder_is_named_and_our_own_is_fine() {
        let process = |name: &str, is_ours| Process { pid: 42, name: name.to_owned(), is_ours };
        let found = holders(&[process("nydusd", false)]);
        assert_eq!((found.level, found.found.as_str()), (Level::Fail, "nydusd (42)"));
        assert_eq!(holders(&[process("nydusd", true)]).level, Level::Ok);
        let both = [process("sluice", true), process("other", false)];
        assert_eq!(holders(&both).level, Level::Fail);
        assert_eq!(holders(&[]).level, Level::Ok);
        assert_eq!(cachefilesd(&[process("cachefilesd", false)]).level, Level::Fail);
        assert_eq!(cachefilesd(&[]).level, Level::Ok);
    }

    #[test]
    fn what_stops_the_fanotify_door_is_a_failure_with_advice() {
        let found =
            |check, is_good, text: &str| probe::Finding { check, is_good, text: text.into() };
        let findings = vec![found("one", true, "a"), found("two", false, "b")];
        let report = Report { findings, reads_directly: false };
        let findings = fanotify(&report);
        let levels: Vec<Level> = findings.iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Ok, Level::Fail]);
        assert_eq!((findings[0].advice.as_str(), findings[1].found.as_str()), ("", "b"));
        assert!(findings[1].advice.contains("6.14"));
    }

    #[test]
    fn a_dead_daemons_socket_is_told_from_none() {
        assert_eq!(daemon(&DaemonState::Absent).level, Level::Info);
        assert_eq!(daemon(&DaemonState::Answers("RUNNING".to_owned())).level, Level::Ok);
        assert_eq!(daemon(&DaemonState::Answers("INIT".to_owned())).level, Level::Warn);
        assert_eq!(daemon(&DaemonState::Silent("refused".to_owned())).level, Level::Warn);
    }
}
