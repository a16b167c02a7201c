//! Children that inherit nothing of the process that started the tests: `nohup`, `ulimit`, `umask`, a shell's
//! environment, or a unit of systemd. Every program that a test starts is started here.

use std::ffi::OsStr;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::sys::stat::{Mode, umask};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

/// What of the environment a child keeps: where programs and folders are, and where coverage is written.
const KEPT: [&str; 5] = ["PATH", "HOME", "USER", "TMPDIR", "LLVM_PROFILE_FILE"];
/// How many files a process may open where nothing else is said.
const OPEN_FILES: u64 = 1024;

/// A command with the signals, limits and environment that a login has, and no standard input.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    static CLEANED: OnceLock<()> = OnceLock::new();
    // In a thread of its own: the test may be within a runtime, in which no other can end.
    CLEANED.get_or_init(|| std::thread::spawn(clean_this_process).join().unwrap());
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
    command.envs(KEPT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command
}

/// Changes what children inherit from this process.
fn clean_this_process() {
    umask(Mode::from_bits_truncate(0o022));
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit }).unwrap();
    // A signal that is ignored stays so across `exec`; one that has a handler gets its default there.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _in_it = runtime.enter();
    let forbidden = [4, 8, 9, 11, 19];
    // Rust itself ignores SIGPIPE, and gives children its default.
    let own = nix::libc::SIGPIPE;
    for number in ignored_signals().filter(|number| !forbidden.contains(number) && *number != own) {
        drop(signal(SignalKind::from_raw(number)).unwrap());
    }
}

/// Signals that this process ignores, by number; real-time signals are no process's.
fn ignored_signals() -> impl Iterator<Item = i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
    (1..32).filter(move |number| mask & (1 << (number - 1)) != 0)
}
