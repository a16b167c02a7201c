//! The command line: parses, calls, prints, and turns ends into exit codes.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the answer is no |
//! | 2 | usage |
//! | 3 | no such VM, or it does not run |
//! | 4 | no permission |
//! | 5 | QMP failed |
//! | 6 | partly applied, see the report |
//! | 70 | a bug |

mod args;
mod attach;
mod choices;
mod config;
mod detach;
mod doctor;
mod failure;
mod host_look;
mod log;
mod look;
mod looked_after;
mod may_start;
mod output;
mod plan;
mod plan_all;
mod reload;
mod scene;
mod serve;
mod status;
mod threads;
mod topology;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::error::{Failure, Kind};
use args::{Command, Qmpin};

/// What a command that did not fail has to say.
pub(crate) enum Answer {
    /// Exit 0.
    Done,
    /// Exit 1: the answer is no, and was said.
    No,
    /// Exit 6: some of it was refused, and was said.
    Partly,
}

/// The command line's own definition, for manual pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Qmpin::command()
}

/// Runs the command line and returns the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let args = match Qmpin::try_parse() {
        Ok(args) => args,
        Err(mistake) => return not_parsed(&mistake),
    };
    output::show_all(args.global.verbose > 0);
    log::start(args.global.verbose, args.global.quiet);
    std::panic::set_hook(Box::new(|panic| end_with_a_bug(&panic.to_string())));
    let code = match run(args) {
        Ok(Answer::Done) => 0,
        Ok(Answer::No) => Kind::No.exit_code(),
        Ok(Answer::Partly) => Kind::Partial.exit_code(),
        Err(failure) => {
            output::error(&failure.report());
            failure.kind().exit_code()
        }
    };
    ExitCode::from(code)
}

/// Prints help or the version with exit code 0, or what is wrong with the command line with 2. Its words may be
/// another program's.
fn not_parsed(mistake: &clap::Error) -> ExitCode {
    if !mistake.use_stderr() {
        // A reader that has gone needs no help.
        let _ = mistake.print();
        return ExitCode::SUCCESS;
    }
    output::error(mistake.render().to_string().trim_end());
    ExitCode::from(Kind::Usage.exit_code())
}

/// Ends the process where it is: it is built without unwinding, and nothing may go on after a mistake.
/// What was written has its undo in the journal, as after SIGKILL.
#[allow(clippy::exit)] // an abort would have the exit code of a signal
fn end_with_a_bug(panic: &str) {
    output::error(&format!(
        "bug: {panic}\nhint: this is a mistake in qmpin; `qmpin detach` still restores everything"
    ));
    std::process::exit(i32::from(Kind::Bug.exit_code()));
}

fn run(args: Qmpin) -> Result<Answer, Failure> {
    let global = &args.global;
    match args.command {
        Command::Attach(attach) => attach::run(global, &attach),
        Command::Detach(detach) => detach::run(global, &detach),
        Command::MayStart(may_start) => may_start::run(global, &may_start),
        Command::Reload(reload) => reload::run(global, &reload),
        Command::Threads(threads) => threads::run(global, &threads),
        Command::Plan(plan) => plan::run(global, &plan),
        Command::Status(status) => status::run(global, &status),
        Command::Verify(verify) => verify::run(global, &verify),
        Command::Doctor(doctor) => doctor::run(global, &doctor),
        Command::Config(config) => config::run(global, &config),
        Command::Topology(topology) => topology::run(global, &topology),
    }
}

/// Runs a future on a runtime of one thread.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = crate::runtime::build().map_err(|error| {
        let failure = Failure::new(Kind::No, format!("could not start: {error}"));
        failure.hint("raise the limit on open files: `ulimit -n`, or LimitNOFILE= of the unit")
    })?;
    Ok(runtime.block_on(future))
}
