//! Draws: documents and texts from values. No I/O; whether there is colour is the caller's to say.

mod plan;
mod restore;
mod table;
mod threads;
mod words;

pub use plan::{Explain, PlanDocument, plan_text};
pub use restore::restore_lines;
pub use threads::ThreadsDocument;
pub use words::{printable, thread_in_words};
