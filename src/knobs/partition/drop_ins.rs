//! Drop-ins by which systemd delegates a VM's unit to qmpin: where they are, and what is in them. Words: no I/O.

/// Where the drop-in of a unit is, relative to the root.
#[must_use]
pub fn drop_in(unit: &str) -> String {
    format!("run/systemd/system/{unit}.d/50-qmpin.conf")
}

/// The unit of a drop-in at this place.
#[must_use]
pub fn unit_of(drop_in: &str) -> Option<&str> {
    drop_in.strip_prefix("run/systemd/system/")?.strip_suffix(".d/50-qmpin.conf")
}

/// Where it is until it is whole.
#[must_use]
pub fn drop_in_new(drop_in: &str) -> String {
    format!("{}.new", drop_in.trim_end_matches(".conf"))
}

/// Whether the text says no more and no less than what is written there: comments may differ from one version to
/// the next.
#[must_use]
pub fn is_our_drop_in(text: &str) -> bool {
    let is_said = |line: &&str| !line.is_empty() && !line.starts_with(['#', ';']);
    let said: Vec<&str> = text.lines().map(str::trim).filter(is_said).collect();
    matches!(said[..], ["[Scope]" | "[Service]", "Delegate=cpuset"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_known_by_its_drop_in() {
        assert_eq!(unit_of(&drop_in("100.scope")), Some("100.scope"));
        assert_eq!(unit_of("run/systemd/system/100.scope.d/other.conf"), None);
        assert_eq!(
            drop_in_new(&drop_in("100.scope")),
            "run/systemd/system/100.scope.d/50-qmpin.new"
        );
    }
}
