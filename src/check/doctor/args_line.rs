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
        let same = |option: &&QemuOption| {
            // QEMU takes two dashes for one.
            word.read.strip_prefix("--").map_or(word.read == option.name, |name| {
                option.name.strip_prefix('-') == Some(name)
            })
        };
        let found = options.iter().position(same);
        let is_it = |option: &QemuOption| value.is_some_and(|value| value.read == option.value);
        match found {
            Some(option) if !has[option] && is_it(options[option]) => has[option] = true,
            Some(option) if options[option].when_there == WhenThere::Replace => {
                at += 2;
                continue;
            }
            _ => {
                kept.push(word.raw);
                at += 1;
                continue;
            }
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
