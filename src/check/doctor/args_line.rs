//! The line `args:` of a VM's Proxmox configuration with options added. There is one such line: of several, Proxmox
//! takes the last. It is split as a shell does (`PVE/QemuServer.pm: PVE::Tools::split_args`), so what is there is
//! kept letter for letter, but for an option that is replaced.

/// An option of QEMU's with its value: `-smp`, `8,sockets=1`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct QemuOption {
    pub(crate) name: &'static str,
    pub(crate) value: String,
    pub(crate) when_there: WhenThere,
}

/// What becomes of an option of the same name that is there already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WhenThere {
    /// It goes: QEMU would mix the two.
    Replace,
    /// It stays: there may be several.
    Add,
}

/// One word as it stands in the line, and as the shell's rules read it.
struct Word<'a> {
    raw: &'a str,
    read: String,
}

impl Word<'_> {
    /// Whether it is this option; QEMU takes two dashes for one.
    fn is_option(&self, name: &str) -> bool {
        self.read == name
            || self.read.strip_prefix("--").is_some_and(|bare| name.strip_prefix('-') == Some(bare))
    }
}

/// The parts between commas of all words of a line; none where it cannot be split.
fn parts(line: &str) -> Vec<String> {
    let words = split(line).unwrap_or_default();
    words.iter().flat_map(|word| word.read.split(',')).map(str::to_owned).collect()
}

/// Returns whether the line has this setting, such as `l3-cache=off`, in any of its options.
pub(crate) fn has_setting(line: &str, setting: &str) -> bool {
    parts(line).iter().any(|part| part == setting)
}

/// Returns whether the line sets this property in any way: `+topoext`, `topoext=on`, or `x86_64-cpu.topoext=off`.
pub(crate) fn names_property(line: &str, property: &str) -> bool {
    parts(line).iter().any(|part| {
        let name = part.split('=').next().unwrap_or(part).trim_start_matches(['+', '-']);
        name == property || name.strip_suffix(property).is_some_and(|rest| rest.ends_with('.'))
    })
}

/// Returns whether the line has a setting whose name begins so, such as `smp-cache.`.
pub(crate) fn has_prefix(line: &str, prefix: &str) -> bool {
    parts(line).iter().any(|part| part.starts_with(prefix))
}

/// Returns whether the line has this option.
pub(crate) fn has_option(line: &str, name: &str) -> bool {
    split(line).is_ok_and(|words| words.iter().any(|word| word.is_option(name)))
}

/// The value of `args:` with these options; the same as `before` where it has them all.
///
/// # Errors
/// Why the line cannot be split.
pub(crate) fn merged(before: &str, options: &[&QemuOption]) -> Result<String, &'static str> {
    let words = split(before)?;
    let mut kept: Vec<&str> = Vec::new();
    let mut has = vec![false; options.len()];
    let mut at = 0;
    while let Some(word) = words.get(at) {
        let value = words.get(at + 1);
        let named = || options.iter().enumerate().filter(|(_, option)| word.is_option(option.name));
        let is_there = |option: &QemuOption| value.is_some_and(|value| value.read == option.value);
        let found = named().find(|(at, option)| !has[*at] && is_there(option)).map(|(at, _)| at);
        let is_replaced = named().any(|(_, option)| option.when_there == WhenThere::Replace);
        if let Some(found) = found {
            has[found] = true;
        } else if is_replaced {
            at += 2;
            continue;
        } else {
            kept.push(word.raw);
            at += 1;
            continue;
        }
        kept.push(word.raw);
        kept.extend(value.map(|value| value.raw));
        at += 2;
    }
    if has.iter().all(|has| *has) && kept.len() == words.len() {
        return Ok(before.to_owned());
    }
    let mut line = kept.join(" ");
    for (option, has) in options.iter().zip(has) {
        if !has {
            let blank = if line.is_empty() { "" } else { " " };
            line.push_str(&format!("{blank}{} {}", option.name, option.value));
        }
    }
    Ok(line)
}

/// The words of a line, by the rules of a shell: blanks, both quotes, backslashes.
fn split(line: &str) -> Result<Vec<Word<'_>>, &'static str> {
    let mut words = Vec::new();
    let mut begun: Option<(usize, String)> = None;
    let mut quote = None;
    let mut chars = line.char_indices();
    while let Some((at, char)) = chars.next() {
        if char.is_whitespace() && quote.is_none() {
            words.extend(begun.take().map(|(from, read)| Word { raw: &line[from..at], read }));
            continue;
        }
        let (_, read) = begun.get_or_insert((at, String::new()));
        match (char, quote) {
            (mark, Some(open)) if mark == open => quote = None,
            ('\'' | '"', None) => quote = Some(char),
            ('\\', None | Some('"')) => match chars.next() {
                Some((_, next)) => read.push(next),
                None => return Err("it ends with a backslash"),
            },
            (char, _) => read.push(char),
        }
    }
    if quote.is_some() {
        return Err("a quote in it is not closed");
    }
    words.extend(begun.map(|(from, read)| Word { raw: &line[from..], read }));
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> [QemuOption; 2] {
        let smp = "8,sockets=1,cores=4,threads=2,maxcpus=8".to_owned();
        let qmp = "unix:/run/qemu-server/100.qmpin,server=on,wait=off".to_owned();
        [
            QemuOption { name: "-smp", value: smp, when_there: WhenThere::Replace },
            QemuOption { name: "-qmp", value: qmp, when_there: WhenThere::Add },
        ]
    }

    #[test]
    fn what_is_there_is_kept_letter_for_letter() {
        let added = "-smp 8,sockets=1,cores=4,threads=2,maxcpus=8 \
                     -qmp unix:/run/qemu-server/100.qmpin,server=on,wait=off";
        let [smp, qmp] = options();
        for (before, kept) in [
            ("", ""),
            ("-cpu host,+topoext", "-cpu host,+topoext "),
            (
                "-device 'vfio-pci,host=01:00.0,x-msg=a  b' -k de",
                "-device 'vfio-pci,host=01:00.0,x-msg=a  b' -k de ",
            ),
            (
                r#"-fw_cfg "name=opt/a b,string=-smp 2" -k\ x"#,
                r#"-fw_cfg "name=opt/a b,string=-smp 2" -k\ x "#,
            ),
            ("-smp 4,cores=4 -k de", "-k de "),
            ("-k de '--smp' \"2\"", "-k de "),
            ("-qmp unix:/x,server=on", "-qmp unix:/x,server=on "),
        ] {
            assert_eq!(merged(before, &[&smp, &qmp]), Ok(format!("{kept}{added}")), "{before}");
        }
    }

    #[test]
    fn an_option_that_is_there_is_not_added_again() {
        let [smp, qmp] = options();
        let line = format!("-k de -qmp {} -smp {}", qmp.value, smp.value);
        assert_eq!(merged(&line, &[&smp, &qmp]), Ok(line.clone()));
        let quoted = format!("-qmp '{}'", qmp.value);
        assert_eq!(merged(&quoted, &[&smp, &qmp]), Ok(format!("{quoted} -smp {}", smp.value)));
        let twice = format!("-smp {} -smp 2", smp.value);
        assert_eq!(merged(&twice, &[&smp]), Ok(format!("-smp {}", smp.value)));
        let same = format!("-smp {0} -smp {0}", smp.value);
        assert_eq!(merged(&same, &[&smp]), Ok(format!("-smp {}", smp.value)));
    }

    #[test]
    fn several_options_of_one_name_are_each_found_again() {
        let global = |value: &str| QemuOption {
            name: "-global",
            value: value.to_owned(),
            when_there: WhenThere::Add,
        };
        let (one, two) = (global("x86_64-cpu.topoext=on"), global("x86_64-cpu.invtsc=on"));
        let line =
            "-global x86_64-cpu.invtsc=on -global ICH9-LPC.x=1 -global x86_64-cpu.topoext=on";
        assert_eq!(merged(line, &[&one, &two]).as_deref(), Ok(line));
        let half = "-global x86_64-cpu.invtsc=on";
        let both = format!("{half} -global x86_64-cpu.topoext=on");
        assert_eq!(merged(half, &[&one, &two]), Ok(both));
    }

    #[test]
    fn a_property_is_found_in_each_way_to_write_it() {
        for line in [
            "-cpu host,+topoext",
            "-cpu 'host,-topoext'",
            "-cpu host,topoext=on -k de",
            "-global x86_64-cpu.topoext=on",
        ] {
            assert!(names_property(line, "topoext"), "{line}");
        }
        for line in ["", "-cpu host,notopoext", "-fw_cfg name=topoext2", "-k 'topoext"] {
            assert!(!names_property(line, "topoext"), "{line}");
        }
        let line = "-cpu host,l3-cache=off -machine smp-cache.0.cache=l3 --smp 4";
        assert!(has_setting(line, "l3-cache=off") && !has_setting(line, "l3-cache"));
        assert!(has_prefix(line, "smp-cache.") && has_option(line, "-smp"));
        assert!(!has_option(line, "-m"));
    }

    #[test]
    fn a_line_that_no_shell_would_split_is_left_alone() {
        let [smp, qmp] = options();
        for line in ["-k 'de", "-k \"de", "-k de\\"] {
            assert!(merged(line, &[&smp, &qmp]).is_err(), "{line}");
        }
        assert_eq!(merged("", &[]), Ok(String::new()));
    }
}
