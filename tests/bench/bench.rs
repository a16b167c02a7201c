//! The figures of speed and size: `cargo bench`, or `cargo bench -- attach lease` for some parts.
//!
//! Every figure is a ratio within one run: the variants take turns, so that what else the machine does
//! hits all of them alike, and medians are compared. Nothing is asserted and nothing is written but one
//! table. It needs a real QEMU and root; where it cannot run it says why and exits 0.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a benchmark that cannot go on stops
#![allow(clippy::print_stdout, clippy::print_stderr)] // it prints a table
#![allow(clippy::cast_precision_loss)] // counts and times are small

mod attach;
mod bare;
#[path = "../support/clean.rs"]
mod clean;
mod figures;
mod hotplug;
mod idle;
mod lease;
mod planning;
#[allow(dead_code)] // the tests' own, of which a part is used here
#[path = "../support/qemu.rs"]
mod qemu;
mod vm;

use std::process::ExitCode;

use figures::Table;

/// A part: its name and what it measures.
type Part = (&'static str, fn(&mut Table));

const PARTS: [Part; 6] = [
    ("attach", attach::measure),
    ("lease", lease::measure),
    ("hotplug", hotplug::measure),
    ("idle", idle::measure),
    ("threads", idle::measure_threads),
    ("planning", planning::measure),
];

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == bare::MODE) {
        return bare::main(&args[1..]);
    }
    // `cargo bench` says so; `cargo test --benches` does not, and builds without optimisation.
    let Some(at) = args.iter().position(|arg| arg == "--bench") else {
        println!("skipped: benchmarks are run by `cargo bench`");
        return ExitCode::SUCCESS;
    };
    args.remove(at);
    if let Some(unknown) = args.iter().find(|arg| PARTS.iter().all(|(name, _)| name != arg)) {
        let names: Vec<&str> = PARTS.iter().map(|(name, _)| *name).collect();
        eprintln!("no part is named `{unknown}`; there are: {}", names.join(", "));
        return ExitCode::from(2);
    }
    if let Err(why) = vm::can_run() {
        println!("skipped: {why}");
        return ExitCode::SUCCESS;
    }
    let mut table = Table::default();
    for (name, measure) in PARTS {
        if args.is_empty() || args.iter().any(|arg| arg == name) {
            eprintln!("{name} …");
            measure(&mut table);
        }
    }
    print!("{table}");
    println!("{}", vm::machine_in_words());
    ExitCode::SUCCESS
}
