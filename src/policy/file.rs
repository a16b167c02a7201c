//! One policy file as written: every key optional, every value with its line.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::{
    CacheNeed, ChannelChoice, CoreNeed, CpuChoice, Displace, IothreadChoice, Knob, Level, Origin,
    Overflow, ParseCpuChoiceError, Policy, Sharing, Smt, Sourced, VcpuSched, VfioIrqs, mistakes,
    single,
};
use crate::cpuset::CpuSet;
use crate::ids::{IothreadId, VcpuIndex};

/// The longest check interval taken, in seconds.
const CHECK_INTERVAL_S_MAX: u64 = 3600;

/// The largest `max_vcpus` taken: no QEMU has more.
const MAX_VCPUS_MAX: u32 = 4096;

/// Which of the files it is: `[host]` is for the host's alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// `qmpin.toml`: `[host]`, and defaults for all VMs.
    Host,
    /// `<vmid>.toml` of a cluster: one VM, on whichever node it is. It names needs, and no CPUs.
    Cluster,
    /// `<vmid>.toml` of this host: one VM.
    Vm,
}

/// A policy file that was refused: which, where, why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}: {reason}", path.display())]
pub struct PolicyError {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// What the file says; `None` where it is silent.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    host: Option<Spanned<RawHost>>,
    vcpus: Option<Spanned<String>>,
    iothreads: Option<Spanned<String>>,
    emulator: Option<Spanned<String>>,
    cores: Option<Spanned<CoreNeed>>,
    cache: Option<Spanned<CacheNeed>>,
    smt: Option<Spanned<Smt>>,
    share: Option<Spanned<bool>>,
    displace: Option<Spanned<bool>>,
    overflow: Option<Spanned<Overflow>>,
    max_vcpus: Option<Spanned<u32>>,
    channel: Option<Spanned<ChannelChoice>>,
    check_interval_s: Option<Spanned<u64>>,
    isolation: Option<Spanned<Level>>,
    sched: Option<Spanned<VcpuSched>>,
    sched_vcpus: Option<Spanned<String>>,
    vcpu: Option<BTreeMap<String, Spanned<RawThread>>>,
    iothread: Option<BTreeMap<String, Spanned<RawThread>>>,
    partition: Option<Spanned<bool>>,
    irqs: Option<Spanned<bool>>,
    vfio_irqs: Option<Spanned<VfioIrqs>>,
    kthreads: Option<Spanned<bool>>,
    workqueues: Option<Spanned<bool>>,
    power: Option<Spanned<bool>>,
    noise: Option<Spanned<bool>>,
    core_scheduling: Option<Spanned<bool>>,
    reonline: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawHost {
    reserved: Option<Spanned<String>>,
    shared: Option<Spanned<String>>,
}

/// `[vcpu.0]`, `[iothread.io0]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawThread {
    cpu: Option<Spanned<String>>,
}

/// Turns spans of one file into lines, and reasons into errors.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
    kind: FileKind,
}

impl Source<'_> {
    fn line(&self, at: usize) -> usize {
        1 + self.text.bytes().take(at).filter(|byte| *byte == b'\n').count()
    }

    /// The parser's words about a span, in words for people.
    fn mistake(&self, said: &str, span: Range<usize>) -> String {
        let before = self.text.get(..span.start).unwrap_or_default();
        let before = before.rsplit('\n').next().unwrap_or_default();
        let value = self.text.get(span).unwrap_or_default();
        mistakes::in_words(said, before, value)
    }

    fn error(&self, at: usize, reason: impl Into<String>) -> PolicyError {
        PolicyError { path: self.path.to_owned(), line: self.line(at), reason: reason.into() }
    }

    fn origin(&self, at: usize) -> Origin {
        Origin::File { path: self.path.to_owned(), line: self.line(at) }
    }

    fn keep<T>(&self, value: Option<Spanned<T>>) -> Option<Sourced<T>> {
        value.map(|value| {
            let origin = self.origin(value.span().start);
            Sourced { value: value.into_inner(), origin }
        })
    }

    /// Reads the text of a key.
    fn parsed<T, E: Display>(
        &self,
        key: &str,
        value: Option<Spanned<String>>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<Option<Sourced<T>>, PolicyError> {
        let Some(value) = value else { return Ok(None) };
        let (text, at) = (value.get_ref(), value.span().start);
        let parsed =
            parse(text).map_err(|error| self.error(at, format!("{key} = \"{text}\": {error}")))?;
        Ok(Some(Sourced { value: parsed, origin: self.origin(at) }))
    }

    /// Refuses CPU numbers in a file for several nodes.
    fn for_this_host(&self, key: &str, value: &str, at: usize) -> Result<(), PolicyError> {
        if self.kind != FileKind::Cluster {
            return Ok(());
        }
        let reason = format!(
            "{key} = \"{value}\": CPU numbers mean something else on every node; say cores and cache, or put it in the \
             node's own /etc/qmpin"
        );
        Err(self.error(at, reason))
    }

    fn choice<T: Display>(
        &self,
        key: &str,
        value: Option<Spanned<String>>,
        parse: fn(&str) -> Result<T, ParseCpuChoiceError>,
        names_cpus: fn(&T) -> bool,
    ) -> Result<Option<Sourced<T>>, PolicyError> {
        let at = value.as_ref().map_or(0, |value| value.span().start);
        let choice = self.parsed(key, value, parse)?;
        if let Some(choice) = choice.as_ref().filter(|choice| names_cpus(&choice.value)) {
            self.for_this_host(key, &choice.value.to_string(), at)?;
        }
        Ok(choice)
    }

    /// The CPUs of single threads: a table for each.
    fn threads<K: Ord, T, E: Display>(
        &self,
        name: &str,
        tables: Option<BTreeMap<String, Spanned<RawThread>>>,
        whose: impl Fn(&str) -> Option<K>,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Result<BTreeMap<K, Sourced<T>>, PolicyError> {
        let mut threads = BTreeMap::new();
        for (who, table) in tables.into_iter().flatten() {
            let at = table.span().start;
            let Some(key) = whose(&who) else {
                let reason =
                    format!("[{name}.{who}]: write the number of a vCPU, such as [{name}.0]");
                return Err(self.error(at, reason));
            };
            let Some(cpu) = table.into_inner().cpu else { continue };
            let (place, at) = (format!("[{name}.{who}] cpu"), cpu.span().start);
            self.for_this_host(&place, cpu.get_ref(), at)?;
            threads.extend(self.parsed(&place, Some(cpu), &parse)?.map(|cpu| (key, cpu)));
        }
        Ok(threads)
    }
}

impl Policy {
    /// Lays the text of a policy file over what was read before, key by key.
    ///
    /// # Errors
    /// [`PolicyError`] with the line and the reason: not TOML, an unknown key, a value of the wrong
    /// kind, a bad cpulist, `[host]` in a VM's file, CPU numbers in a cluster's.
    pub fn with_file(
        mut self,
        text: &str,
        path: &Path,
        kind: FileKind,
    ) -> Result<Policy, PolicyError> {
        let source = Source { path, text, kind };
        let raw: RawFile = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            source.error(span.start, source.mistake(error.message(), span))
        })?;
        let vm = &mut self.vm;
        let by_hand = |choice: &CpuChoice| *choice != CpuChoice::Auto;
        vm.vcpus.lay(source.choice("vcpus", raw.vcpus, CpuChoice::parse_vcpus, by_hand)?);
        let iothreads =
            source.choice("iothreads", raw.iothreads, IothreadChoice::parse, |choice| {
                choice.cpus != CpuChoice::Auto
            })?;
        vm.iothreads.lay(iothreads);
        vm.emulator.lay(source.choice("emulator", raw.emulator, CpuChoice::parse_set, by_hand)?);
        let index = |who: &str| who.parse().ok().map(VcpuIndex);
        vm.vcpu_cpus.extend(source.threads("vcpu", raw.vcpu, index, single::one_cpu)?);
        let id = |who: &str| Some(IothreadId(who.to_owned()));
        let cpus = |text: &str| match CpuSet::parse_cpulist(text) {
            Ok(cpus) if cpus.is_empty() => Err("it names no CPU".to_owned()),
            cpus => cpus.map_err(|error| error.to_string()),
        };
        vm.iothread_cpus.extend(source.threads("iothread", raw.iothread, id, cpus)?);
        vm.cores.lay(source.keep(raw.cores));
        vm.cache.lay(source.keep(raw.cache));
        vm.smt.lay(source.keep(raw.smt));
        let sharing = |share| if share { Sharing::Wrap } else { Sharing::Refuse };
        vm.share.lay(source.keep(raw.share).map(|share| share.map(sharing)));
        let displace = |freely| if freely { Displace::Freely } else { Displace::WhereNeeded };
        vm.displace.lay(source.keep(raw.displace).map(|freely| freely.map(displace)));
        vm.overflow.lay(source.keep(raw.overflow));
        vm.channel.lay(source.keep(raw.channel));
        vm.isolation.lay(source.keep(raw.isolation));
        vm.vfio_irqs.lay(source.keep(raw.vfio_irqs));
        vm.sched.lay(source.keep(raw.sched));
        let vcpus = source.parsed("sched_vcpus", raw.sched_vcpus, str::parse)?;
        vm.sched_vcpus.lay(vcpus.map(|vcpus| vcpus.map(Some)));
        for (knob, value) in [
            (Knob::Partition, raw.partition),
            (Knob::Irqs, raw.irqs),
            (Knob::Kthreads, raw.kthreads),
            (Knob::Workqueues, raw.workqueues),
            (Knob::Power, raw.power),
            (Knob::Noise, raw.noise),
            (Knob::CoreScheduling, raw.core_scheduling),
            (Knob::Reonline, raw.reonline),
        ] {
            vm.knobs.extend(source.keep(value).map(|value| (knob, value)));
        }
        if let Some(seconds) = &raw.check_interval_s
            && !(1..=CHECK_INTERVAL_S_MAX).contains(seconds.get_ref())
        {
            let reason = format!(
                "check_interval_s = {}: must be 1 to {CHECK_INTERVAL_S_MAX} seconds",
                seconds.get_ref()
            );
            return Err(source.error(seconds.span().start, reason));
        }
        let seconds = source.keep(raw.check_interval_s);
        vm.check_interval.lay(seconds.map(|seconds| seconds.map(Duration::from_secs)));
        if let Some(max) = &raw.max_vcpus
            && !(1..=MAX_VCPUS_MAX).contains(max.get_ref())
        {
            let reason = format!("max_vcpus = {}: must be 1 to {MAX_VCPUS_MAX}", max.get_ref());
            return Err(source.error(max.span().start, reason));
        }
        vm.max_vcpus.lay(source.keep(raw.max_vcpus).map(|max| max.map(Some)));
        let Some(host) = raw.host else { return Ok(self) };
        if kind != FileKind::Host {
            let reason = "[host] belongs in qmpin.toml: it holds for every VM";
            return Err(source.error(host.span().start, reason));
        }
        let host = host.into_inner();
        let reserved = source.choice("reserved", host.reserved, CpuChoice::parse_set, by_hand)?;
        self.host.reserved.lay(reserved);
        let at = host.shared.as_ref().map_or(0, |shared| shared.span().start);
        let shared = source.choice("shared", host.shared, CpuChoice::parse_set, by_hand)?;
        if shared.as_ref().is_some_and(|shared| shared.value == CpuChoice::Auto) {
            let reason =
                "shared = \"auto\": name CPUs, or leave the line out: there are none by default";
            return Err(source.error(at, reason));
        }
        self.host.shared.lay(shared.map(|shared| shared.map(|cpus| cpus.cpus())));
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, kind: FileKind) -> Result<Policy, PolicyError> {
        Policy::default().with_file(text, Path::new("/etc/qmpin/x.toml"), kind)
    }

    #[test]
    fn every_bad_line_is_named_with_its_reason() {
        for (text, line, reason) in [
            ("share = true\nvcpus = \"6-3\"\n", 2, "ends before it begins"),
            ("\n\nvcpu = \"1\"\n", 3, "did you mean `vcpus`?"),
            ("[hosts]\nshared = \"1\"\n", 1, "did you mean `host`?"),
            ("[host]\nreserve = \"1\"\n", 2, "did you mean `reserved`?"),
            ("colour = 1\n", 1, "the keys here are host, vcpus, "),
            ("share = \"yes\"\n", 1, "share = \"yes\": must be true or false, without quotes"),
            ("overflow = \"drop\"\n", 1, "overflow = \"drop\": must be \"shared\" or \"refuse\""),
            ("irqs = true\nvfio_irqs = \"vcpu\"\n", 2, "did you mean \"vcpus\"?"),
            ("isolation = \"Strict\"\n", 1, "did you mean \"strict\"?"),
            ("share = true\n[vcpu]\ncpu = \"1\"\n", 3, "[vcpu.0]"),
            ("[vcpu.x]\ncpu = \"1\"\n", 1, "[vcpu.x]: write the number"),
            ("[vcpu.0]\ncpu = \"1-2\"\n", 2, "a vCPU has one CPU"),
            ("[vcpu.0]\ncpus = \"1\"\n", 2, "did you mean `cpu`?"),
            ("[iothread.io0]\ncpu = \"\"\n", 2, "it names no CPU"),
            ("iothreads = \"all\"\n", 1, "`all` is not a CPU number"),
            ("sched_vcpus = \"7-1\"\n", 1, "ends before it begins"),
            ("smt = \"Isolate\"\n", 1, "did you mean \"isolate\"?"),
            ("vcpus = 5\n", 1, "vcpus = 5: must be \"auto\", or CPUs in quotes"),
            ("vcpus = [1, 2]\n", 1, "vcpus = [1, 2]: must be \"auto\", or CPUs"),
            ("vcpus = \"Auto\"\n", 1, "did you mean auto?"),
            ("vcpus = \"1,,2\"\n", 1, "nothing between two commas"),
            (
                "check_interval_s = nan\n",
                1,
                "check_interval_s = nan: must be a whole number of seconds",
            ),
            (
                "check_interval_s = -1\n",
                1,
                "check_interval_s = -1: must be a whole number of seconds",
            ),
            ("host = 3\n", 1, "host = 3: must be a table of its own"),
            ("vcpus = \"\"\n", 1, "names no CPU"),
            ("check_interval_s = 0\n", 1, "1 to 3600"),
            ("share = true\nsched = \"rr:1\"\n", 2, "fifo:1 to fifo:99"),
            ("vcpus = \n", 1, ""),
            ("share = true\nshare = false\n", 2, "duplicate"),
            ("share = true\n[host]\nshared = \"0,x\"\n", 3, "`x`"),
        ] {
            let error = parse(text, FileKind::Host).expect_err(text);
            assert_eq!(error.line, line, "{text:?}: {error}");
            assert!(error.reason.contains(reason), "{text:?}: {error}");
            assert!(error.to_string().starts_with("/etc/qmpin/x.toml:"), "{error}");
        }
    }

    #[test]
    fn a_knob_of_its_own_wins_over_the_level() {
        let of = |text| parse(text, FileKind::Vm).expect("good").vm.wanted_knobs();
        assert_eq!(of(""), Level::Exclusive.knobs());
        assert_eq!(of("isolation = \"pinned\"\nirqs = true\n"), [Knob::Irqs].into());
        let strict = of("isolation = \"strict\"\npower = false\n");
        assert!(!strict.contains(&Knob::Power) && strict.contains(&Knob::Noise));
        let error = parse("isolation = \"total\"\n", FileKind::Vm).expect_err("no such level");
        assert!(error.reason.contains("\"total\""), "{error}");
    }

    #[test]
    fn the_host_table_is_refused_in_a_vm_file() {
        for kind in [FileKind::Vm, FileKind::Cluster] {
            let error = parse("share = true\n[host]\nreserved = \"0\"\n", kind);
            assert_eq!(error.expect_err("refused").line, 2);
        }
    }

    #[test]
    fn a_cluster_names_needs_and_no_cpu_numbers() {
        let needs = "cores = \"performance\"\ncache = \"large\"\nvcpus = \"auto\"\n";
        let policy = parse(needs, FileKind::Cluster).expect("good");
        assert_eq!(policy.vm.cores.value, CoreNeed::Performance);
        assert_eq!(policy.vm.cache.value, CacheNeed::Large);
        for key in ["vcpus", "iothreads", "emulator"] {
            let text = format!("share = true\n{key} = \"4-7\"\n");
            let error = parse(&text, FileKind::Cluster).expect_err("refused");
            assert_eq!(error.line, 2);
            assert!(error.reason.contains("on every node"), "{error}");
            assert!(parse(&text, FileKind::Vm).is_ok());
        }
    }

    #[test]
    fn a_later_file_wins_key_by_key_and_values_know_their_line() {
        let host = parse(
            "share = true\noverflow = \"refuse\"\nvfio_irqs = \"vcpus\"\n[host]\nreserved = \"0-1\"\n",
            FileKind::Host,
        )
        .expect("good");
        let vm = "\nshare = false\nvcpus = \"auto\"\nvfio_irqs = \"leave\"\n";
        let path = Path::new("/etc/qmpin/x.toml");
        let policy = host.with_file(vm, path, FileKind::Vm).expect("good");
        assert_eq!(policy.vm.share.value, Sharing::Refuse);
        assert!(policy.vm.share.origin.to_string().ends_with("x.toml:2"));
        assert_eq!(policy.vm.overflow.value, Overflow::Refuse);
        assert_eq!(policy.vm.emulator.origin, Origin::Default);
        assert_eq!(policy.vm.vfio_irqs.value, VfioIrqs::Leave);
        assert!(matches!(policy.host.reserved.value, CpuChoice::Cpus(cpus) if cpus.len() == 2));
    }
}
