//! What the commands print, and what is shipped with them.

#[macro_use]
#[path = "../support/mod.rs"]
mod support;

mod cli;
mod config;
mod declared;
mod output;
mod plan_all;
mod shipped_units;
mod shown;
mod world;
