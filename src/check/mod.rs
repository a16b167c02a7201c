//! Judges the host by the kernel's own files: `verify` says whether what was promised holds, `doctor` what is not
//! promised yet.

pub mod doctor;
pub mod verify;
