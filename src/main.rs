//! The `qmpin` command. All of it is in the library.

fn main() -> std::process::ExitCode {
    qmpin::cli::main()
}
