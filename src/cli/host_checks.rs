//! What the readings of a host mean: the cache's file system, privileges, limits, io_uring.
//!
//! Pure functions from text and figures to a finding. Nothing here reads anything; `system` does.

use super::doctor::{Finding, Level, finding};
use super::output;
use super::system::{CacheDirectory, Ring};

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// The magic numbers of statfs(2) that matter here.
const FILE_SYSTEMS: [(u64, &str, Level); 6] = [
    (0xEF53, "ext4", Level::Ok),
    (0x5846_5342, "xfs", Level::Ok),
    (0x9123_683E, "btrfs", Level::Warn),
    (0x0102_1994, "tmpfs", Level::Fail),
    (0x794C_7630, "overlay", Level::Fail),
    (0x6969, "nfs", Level::Fail),
];

/// What the kernel would keep its cache on.
pub fn file_system(cache: &CacheDirectory) -> Finding {
    let check = "cache file system";
    let place = match cache.path == cache.nearest {
        true => cache.path.display().to_string(),
        false => {
            format!("{} (absent; judged by {})", cache.path.display(), cache.nearest.display())
        }
    };
    let known = FILE_SYSTEMS.iter().find(|(kind, ..)| *kind == cache.kind);
    let (name, level) = known.map_or(("an unknown file system", Level::Warn), |k| (k.1, k.2));
    let advice = match level {
        Level::Ok => "",
        _ => "the kernel's cache needs extended attributes and bmap: put it on ext4 or xfs",
    };
    finding(check, level, format!("{name}, {place}"), advice)
}

/// Whether the cache's files can be written as the kernel writes them.
pub fn direct_io(cache: &CacheDirectory) -> Finding {
    let check = "cache direct I/O";
    match cache.direct_io {
        None => finding(check, Level::Ok, "works", ""),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => finding(
            check,
            Level::Fail,
            "the directory is not writable",
            "name another with --fscache",
        ),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EISDIR) => {
            finding(check, Level::Fail, "refused (O_DIRECT)", "put the cache on ext4 or xfs")
        }
        Some(errno) => {
            let text = std::io::Error::from_raw_os_error(errno);
            finding(check, Level::Warn, format!("could not be tried: {text}"), "")
        }
    }
}

/// cachefiles' defaults: below 7 % (brun) culling is asked for, below 5 % (bcull) it must happen,
/// and below 1 % (bstop) nothing is cached any more; the same for files (frun, fcull, fstop).
pub fn space(cache: &CacheDirectory) -> Finding {
    let check = "cache space";
    let percent = |(all, free): (u64, u64)| {
        if all == 0 { 100 } else { (u128::from(free) * 100 / u128::from(all)) as u64 }
    };
    let (blocks, files) = (percent(cache.blocks), percent(cache.files));
    let free = output::bytes(cache.blocks.1.saturating_mul(cache.block_size_bytes));
    let found = format!("{free} free ({blocks} % of blocks, {files} % of files)");
    let (level, advice) = match blocks.min(files) {
        0 => {
            (Level::Fail, "below bstop (1 %) the kernel caches nothing and reads fail: free space")
        }
        1..5 => (Level::Warn, "below bcull (5 %): cached images are culled; free some space"),
        5..7 => (Level::Warn, "below brun (7 %): culling starts soon; free some space"),
        _ => (Level::Ok, ""),
    };
    finding(check, level, found, advice)
}

/// The only page size the kernel's two halves agree on.
pub fn page_size(bytes: Option<u64>) -> Finding {
    let check = "page size";
    match bytes {
        Some(4096) => finding(check, Level::Ok, "4096 bytes", ""),
        Some(bytes) => {
            let advice = "EROFS over fscache needs 4 KiB pages: boot such a kernel";
            finding(check, Level::Fail, format!("{bytes} bytes"), advice)
        }
        None => finding(check, Level::Warn, "unknown", "must be 4096 bytes"),
    }
}

fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn capable(status: &str, capability: u32) -> bool {
    status_field(status, "CapEff")
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
        .is_some_and(|set| set >> capability & 1 == 1)
}

/// Who we are.
pub fn privileges(status: &str, uid_map: Option<&str>) -> Finding {
    let check = "privileges";
    let user = status_field(status, "Uid").and_then(|ids| ids.split_whitespace().nth(1));
    let found = format!("effective user {}", user.unwrap_or("unknown"));
    let initial = uid_map.is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]));
    if !initial {
        let advice = "the device and mount(2) want CAP_SYS_ADMIN of the initial user namespace";
        return finding(check, Level::Fail, format!("{found}, in a user namespace"), advice);
    }
    match capable(status, CAP_SYS_ADMIN) {
        true => finding(check, Level::Ok, format!("{found}, CAP_SYS_ADMIN"), ""),
        false => finding(check, Level::Fail, format!("{found}, no CAP_SYS_ADMIN"), "run as root"),
    }
}

/// The soft and the hard limit; None is "unlimited".
fn limit(limits: &str, name: &str) -> Option<(Option<u64>, Option<u64>)> {
    let mut fields = limits.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace();
    let mut next = || match fields.next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    Some((next()?, next()?))
}

/// Every open image costs a descriptor per blob and one for its bootstrap.
pub fn open_files(limits: Option<&str>, status: &str) -> Finding {
    const COMFORTABLE: u64 = 65_536;
    let check = "open files";
    let Some((_, hard)) = limits.and_then(|text| limit(text, "Max open files")) else {
        return finding(check, Level::Warn, "limit unknown", "");
    };
    let found = hard.map_or("unlimited".to_owned(), |hard| format!("at most {hard}"));
    match hard {
        Some(hard) if hard < COMFORTABLE && !capable(status, CAP_SYS_RESOURCE) => {
            let advice = "each open blob takes one: raise LimitNOFILE or grant CAP_SYS_RESOURCE";
            finding(check, Level::Warn, found, advice)
        }
        _ => finding(check, Level::Ok, found, ""),
    }
}

/// Registered buffers count against it (io_uring/rsrc.c) unless the daemon has CAP_IPC_LOCK.
pub fn locked_memory(limits: Option<&str>, status: &str) -> Finding {
    const COMFORTABLE: u64 = 64 << 20;
    let check = "locked memory";
    match limits.and_then(|text| limit(text, "Max locked memory")) {
        Some((Some(soft), _)) if soft < COMFORTABLE && !capable(status, CAP_IPC_LOCK) => {
            let advice = "registered buffers may not fit: raise LimitMEMLOCK to 64 MiB or more";
            finding(check, Level::Warn, output::bytes(soft), advice)
        }
        Some((Some(soft), _)) => finding(check, Level::Ok, output::bytes(soft), ""),
        Some((None, _)) => finding(check, Level::Ok, "unlimited", ""),
        None => finding(check, Level::Warn, "limit unknown", ""),
    }
}

/// Whether the engine can run.
pub fn io_uring(ring: &Ring, disabled: Option<&str>) -> Finding {
    let check = "io_uring";
    let switch = disabled.map_or("0", str::trim);
    match ring {
        Ring::Works(missing) if missing.is_empty() => finding(check, Level::Ok, "works", ""),
        Ring::Works(missing) => {
            let found = format!("without {}", missing.join(", "));
            finding(check, Level::Fail, found, "needs a newer kernel")
        }
        Ring::Refused(_) if switch != "0" => {
            let found = format!("kernel.io_uring_disabled = {switch}");
            finding(check, Level::Fail, found, "sysctl kernel.io_uring_disabled=0")
        }
        Ring::Refused(errno) => {
            let text = std::io::Error::from_raw_os_error(*errno);
            let advice = "a seccomp filter or container runtime may forbid it; run outside";
            finding(check, Level::Fail, format!("refused: {text}"), advice)
        }
        Ring::Unknown => finding(check, Level::Warn, "not tried", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const ROOT: &str = "Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n";
    const USER: &str = "Name:\tx\nUid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n";
    const INITIAL: &str = "         0          0 4294967295\n";

    fn cache(kind: u64, free_blocks: u64, free_files: u64) -> CacheDirectory {
        CacheDirectory {
            path: PathBuf::from("/c"),
            nearest: PathBuf::from("/c"),
            kind,
            block_size_bytes: 4096,
            blocks: (1000, free_blocks),
            files: (1000, free_files),
            direct_io: None,
        }
    }

    #[test]
    fn only_ext4_and_xfs_are_known_to_work() {
        assert_eq!(file_system(&cache(0xEF53, 1, 1)).level, Level::Ok);
        assert_eq!(file_system(&cache(0x5846_5342, 1, 1)).level, Level::Ok);
        assert_eq!(file_system(&cache(0x0102_1994, 1, 1)).level, Level::Fail);
        assert_eq!(file_system(&cache(0x794C_7630, 1, 1)).level, Level::Fail);
        assert_eq!(file_system(&cache(0xABCD, 1, 1)).level, Level::Warn);
        let absent = CacheDirectory { nearest: PathBuf::from("/"), ..cache(0xEF53, 1, 1) };
        assert!(file_system(&absent).found.contains("judged by /"));
    }

    #[test]
    fn space_follows_the_kernels_thresholds_for_blocks_and_files() {
        let level = |blocks, files| space(&cache(0xEF53, blocks, files)).level;
        assert_eq!(level(500, 500), Level::Ok);
        assert_eq!(level(70, 500), Level::Ok);
        assert_eq!(level(69, 500), Level::Warn);
        assert_eq!(level(500, 10), Level::Warn);
        assert_eq!(level(9, 500), Level::Fail);
        let boundless = CacheDirectory { files: (0, 0), ..cache(0xEF53, 500, 0) };
        assert_eq!(space(&boundless).level, Level::Ok);
    }

    #[test]
    fn direct_io_tells_a_refusal_from_a_lack_of_rights() {
        let with =
            |direct_io| super::direct_io(&CacheDirectory { direct_io, ..cache(0xEF53, 1, 1) });
        assert_eq!(with(None).level, Level::Ok);
        assert!(with(Some(libc::EACCES)).found.contains("writable"));
        assert!(with(Some(libc::EINVAL)).found.contains("O_DIRECT"));
        assert_eq!(with(Some(libc::ENOSPC)).level, Level::Warn);
    }

    #[test]
    fn root_in_a_user_namespace_is_not_root() {
        assert_eq!(privileges(ROOT, Some(INITIAL)).level, Level::Ok);
        assert_eq!(privileges(ROOT, Some("0 100000 65536")).level, Level::Fail);
        assert_eq!(privileges(USER, Some(INITIAL)).level, Level::Fail);
        assert_eq!(privileges("", None).level, Level::Fail);
    }

    #[test]
    fn a_low_descriptor_limit_matters_without_the_right_to_raise_it() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\n\
            Max open files            1024                 4096                 files\n";
        assert_eq!(open_files(Some(limits), USER).level, Level::Warn);
        assert_eq!(open_files(Some(limits), ROOT).level, Level::Ok);
        assert_eq!(open_files(Some(&limits.replace("4096", "unlimited")), USER).level, Level::Ok);
        assert_eq!(open_files(None, USER).level, Level::Warn);
        assert_eq!(open_files(Some("Max open files  x y"), USER).level, Level::Warn);
    }

    #[test]
    fn locked_memory_below_the_buffers_is_a_warning() {
        let with = |soft: &str| {
            locked_memory(Some(&format!("Max locked memory  {soft}  {soft}  bytes")), USER)
        };
        assert_eq!(with("65536").level, Level::Warn);
        assert_eq!(with("67108864").level, Level::Ok);
        assert_eq!(with("unlimited").level, Level::Ok);
        let low = "Max locked memory  65536  65536  bytes";
        assert_eq!(locked_memory(Some(low), ROOT).level, Level::Ok);
    }

    #[test]
    fn a_refused_ring_blames_the_sysctl_when_it_is_set() {
        assert!(io_uring(&Ring::Refused(libc::EPERM), Some("2\n")).advice.contains("sysctl"));
        assert!(io_uring(&Ring::Refused(libc::EPERM), Some("0\n")).advice.contains("seccomp"));
        assert!(io_uring(&Ring::Refused(libc::ENOSYS), None).advice.contains("seccomp"));
        assert_eq!(io_uring(&Ring::Works(vec![]), Some("1\n")).level, Level::Ok);
        assert_eq!(io_uring(&Ring::Works(vec!["send"]), None).found, "without send");
    }

    #[test]
    fn only_4_kib_pages_serve() {
        assert_eq!(page_size(Some(4096)).level, Level::Ok);
        assert_eq!(page_size(Some(65536)).level, Level::Fail);
        assert_eq!(page_size(None).level, Level::Warn);
    }
}
