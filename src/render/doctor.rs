//! What still costs something: the document `qmpin.doctor/1`, and a table with the commands that fix it.

use serde::Serialize;

use super::table::table;
use crate::check::doctor::{Advice, Health};
use crate::ids::VmName;
use crate::shown;

/// `doctor --json`.
#[derive(Debug, Serialize)]
pub struct DoctorDocument<'a> {
    schema: &'static str,
    vm: Option<&'a VmName>,
    advice: Vec<Advice>,
}

impl DoctorDocument<'_> {
    /// Of what was looked at.
    #[must_use]
    pub fn new(vm: Option<&VmName>, advice: Vec<Advice>) -> DoctorDocument<'_> {
        DoctorDocument { schema: "qmpin.doctor/1", vm, advice }
    }

    /// Whether there is nothing to mend.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.advice.iter().all(|one| one.health == Health::Fine)
    }

    /// The table for a terminal, and below it a line for each thing that can be mended.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut rows = vec![["CHECK", "", ""].map(str::to_owned)];
        rows.extend(self.advice.iter().map(|one| {
            let health = match one.health {
                Health::Fine => "fine",
                Health::Costs => "COSTS",
            };
            [one.check.to_owned(), health.to_owned(), one.reason.clone()]
        }));
        let mut text = table(&rows);
        let mut mends: Vec<(&str, Vec<&str>)> = Vec::new();
        for (check, mend) in
            self.advice.iter().filter_map(|one| Some((one.check, one.mend.as_ref()?)))
        {
            // One line may mend several.
            match mends.iter_mut().find(|(known, _)| known == mend) {
                Some((_, checks)) => checks.push(check),
                None => mends.push((mend, vec![check])),
            }
        }
        for (mend, checks) in mends {
            text.push_str(&format!("\n{}:\n    {}\n", checks.join(", "), shown::line(mend)));
        }
        text
    }
}
