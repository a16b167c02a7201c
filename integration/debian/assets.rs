//! Writes the manual pages of every command and the completions of three shells, from the command line's own
//! definition, so that they cannot say anything else.
//!
//! `cargo run --example assets -- FOLDER`

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use clap::Command;
use clap_complete::{Shell, generate_to};
use clap_mangen::Man;

/// What the main page says beyond its options.
const MAIN_PAGE: &str = include_str!("../man/qmpin.1.in");

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1) else {
        let _ = writeln!(io::stderr(), "usage: assets FOLDER");
        return ExitCode::from(2);
    };
    match write_all(Path::new(&folder)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{}: {error}", folder.to_string_lossy());
            ExitCode::FAILURE
        }
    }
}

fn write_all(folder: &Path) -> io::Result<()> {
    let (man, completions) = (folder.join("man"), folder.join("completions"));
    for folder in [&man, &completions] {
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir_all(folder)?;
    }
    let mut command = qmpin::cli::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, "qmpin", &completions)?;
    }
    command.build();
    pages(&command, "qmpin", &man)
}

/// A page for the command, and one for each below it.
fn pages(command: &Command, name: &str, folder: &Path) -> io::Result<()> {
    let is_main = name == "qmpin";
    // Built, a command knows its whole name: `qmpin-attach`.
    let man = Man::new(command.clone()).manual("qmpin").section("1");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().next().is_some() {
        man.render_options_section(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.extend_from_slice(if is_main {
        MAIN_PAGE.as_bytes()
    } else {
        b".SH \"SEE ALSO\"\n\\fBqmpin\\fR(1), \\fBqmpin.toml\\fR(5), \\fBqmpin\\fR(7)\n"
    });
    fs::write(folder.join(format!("{name}.1")), page)?;
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        pages(below, &format!("{name}-{}", below.get_name()), folder)?;
    }
    Ok(())
}
