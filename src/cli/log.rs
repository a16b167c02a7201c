//! Logging: to standard error, a line per decision, hidden characters escaped. Under systemd a line begins with its
//! priority (`man 3 sd-daemon`) and has no time, since the journal has both.

use std::fmt::{self, Write as _};
use std::os::linux::fs::MetadataExt as _;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::output;
use crate::shown;

/// Starts logging for the whole process.
pub(super) fn start(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => Level::WARN,
        (false, 0) => Level::INFO,
        (false, 1) => Level::DEBUG,
        (false, _) => Level::TRACE,
    };
    let line = Line { to_journal: stderr_is_the_journal(), columns: output::columns() };
    // Only a second start in one process could fail, and would change nothing.
    let _ = tracing::subscriber::set_global_default(subscriber(level, line, std::io::stderr));
}

fn subscriber<W>(level: Level, line: Line, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(writer)
        // A log whose reader has gone must not end the supervisor.
        .log_internal_errors(false)
        .event_format(line)
        .finish()
}

/// systemd says by device and inode which stream it reads (`man 5 systemd.exec`, `JOURNAL_STREAM`).
fn stderr_is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    stream == format!("{}:{}", stderr.st_dev(), stderr.st_ino())
}

struct Line {
    to_journal: bool,
    /// How wide it may be; `None`: as it is.
    columns: Option<usize>,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        if self.to_journal {
            let priority = match level {
                Level::ERROR => 3,
                Level::WARN => 4,
                Level::INFO => 6,
                _ => 7,
            };
            write!(writer, "<{priority}>")?;
        } else if level != Level::INFO {
            write!(writer, "{}: ", level.as_str().to_ascii_lowercase())?;
        }
        let mut text = String::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>() {
                write!(text, "{}: ", fields.fields)?;
            }
        }
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        let line = shown::line(&text);
        let fitted = self.columns.map(|columns| shown::cut(&line, columns));
        writeln!(writer, "{}", fitted.as_ref().unwrap_or(&line))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_name_in_a_log_line_cannot_drive_a_terminal_or_make_a_line_of_its_own() {
        let dir = tempfile::tempdir().expect("a folder");
        for to_journal in [false, true] {
            let path = dir.path().join("log");
            let file = fs::File::create(&path).expect("a file");
            let log = subscriber(Level::INFO, Line { to_journal, columns: None }, file);
            tracing::subscriber::with_default(log, || {
                let vm = tracing::info_span!("vm", name = %"a\u{202e}b\n<0>c");
                let _entered = vm.enter();
                tracing::warn!("cgroup x\x1b[2J\x1b]0;t\x07\u{9b}31m.scope\n<0>all is well");
            });
            let log = fs::read_to_string(&path).expect("written");
            assert_eq!(log.lines().count(), 1, "{log:?}");
            let shown = log.trim_end_matches('\n');
            assert_eq!(shown::line(shown), shown);
            assert!(shown.contains("\\u{9b}31m.scope\\n<0>all is well"), "{shown}");
        }
    }

    #[test]
    fn a_list_in_a_log_line_is_cut_unless_all_is_wanted() {
        let dir = tempfile::tempdir().expect("a folder");
        let cpus: Vec<String> = (0..200).step_by(2).map(|cpu| cpu.to_string()).collect();
        for (columns, is_cut) in [(Some(120), true), (None, false)] {
            let path = dir.path().join("log");
            let file = fs::File::create(&path).expect("a file");
            let log = subscriber(Level::INFO, Line { to_journal: false, columns }, file);
            tracing::subscriber::with_default(log, || {
                tracing::info!("VM 100: CPUs {} are busy", cpus.join(","));
            });
            let log = fs::read_to_string(&path).expect("written");
            assert_eq!(log.trim_end().chars().count() <= 120, is_cut, "{log}");
            assert_eq!(log.contains(" more),196,198 are busy"), is_cut, "{log}");
        }
    }
}
