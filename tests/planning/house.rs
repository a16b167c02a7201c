//! What may import what, read from the sources: planning is pure, folders know only what is below them, and there are
//! no knots.

#![allow(clippy::expect_used)] // a source that cannot be read fails the test

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// What a planner has no business with.
const IMPURE: [&str; 19] = [
    "std::fs",
    "std::net",
    "std::os",
    "std::io",
    "std::env",
    "std::process",
    "Instant",
    "SystemTime",
    "std::thread",
    "tokio",
    "nix",
    "rustix",
    "zbus",
    "tracing",
    "rand",
    "HashMap", // its order is random; so is a set's
    "HashSet",
    "println",
    "eprintln",
];
/// Planners that are not in `plan/`, and not called so.
const PLANNERS: [&str; 11] = [
    "knobs::affinity::diff",
    "knobs::findings",
    "knobs::host",
    "knobs::host::diff",
    "knobs::host::irqs",
    "knobs::host::kthreads",
    "knobs::host::new_irqs",
    "knobs::host::noise",
    "knobs::host::power",
    "knobs::host::workqueues",
    "knobs::partition::plan::steps",
];
/// What planners may import beside each other, modules with what is below them. A planner is as pure as these are, so
/// they are looked at as well.
const WORDS: [&str; 22] = [
    "cpuset",
    "guest",
    "ids",
    "journal::unknown",
    "knobs::core_scheduling::journal",
    "knobs::host::memory",
    "knobs::step",
    "knobs::host::places",
    "knobs::host::step",
    "knobs::partition::drop_ins",
    "knobs::priority::journal",
    "leases::lease",
    "mask",
    "policy",
    "devices",
    "promises",
    "scheduling",
    "shown",
    "site",
    "threads",
    "topology",
    "wording",
];

/// `crate::plan::vcpus` is `plan::vcpus`.
type Module = String;

/// The modules of the crate, each with its code without comments, strings and tests.
struct House {
    code: BTreeMap<Module, String>,
    /// What a module has under a name of its own that is another's: `pub use`.
    shown: BTreeMap<(Module, String), Module>,
}

impl House {
    fn read() -> House {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut code = BTreeMap::new();
        let mut folders = vec![src.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(&src).expect("below it").with_extension("");
                let name = name.to_str().expect("text").replace('/', "::");
                let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
                if !["lib", "main"].contains(&name.as_str()) {
                    let text = fs::read_to_string(&path).expect("a source file");
                    code.insert(name, without_tests(&bare(&text)));
                }
            }
        }
        assert!(code.len() > 100, "only {} modules", code.len());
        let mut house = House { code, shown: BTreeMap::new() };
        let mut shown = BTreeMap::new();
        for (module, code) in &house.code {
            for (is_shown, path) in uses(code) {
                if let (true, Some(path)) = (is_shown, house.absolute(module, &path)) {
                    let name = path.rsplit("::").next().expect("a name").to_owned();
                    shown.insert((module.clone(), name), path);
                }
            }
        }
        house.shown = shown;
        house
    }

    /// A path as it is from the root of the crate; `None`: it is another crate's.
    fn absolute(&self, module: &str, path: &str) -> Option<String> {
        let mut base: Vec<&str> = module.split("::").collect();
        let mut rest: Vec<&str> = path.split("::").collect();
        match rest[0] {
            "crate" => base.clear(),
            "self" => {}
            "super" => {}
            child if self.code.contains_key(&format!("{module}::{child}")) => {
                return Some(format!("{module}::{path}"));
            }
            _ => return None,
        }
        while ["crate", "self", "super"].contains(rest.first()?) {
            if rest.remove(0) == "super" {
                base.pop();
            }
        }
        base.extend(rest);
        Some(base.join("::"))
    }

    /// The module in which what is at this path is written.
    fn home(&self, path: &str) -> Option<Module> {
        let mut path = path.to_owned();
        loop {
            let mut module = path.as_str();
            while !self.code.contains_key(module) {
                module = module.rsplit_once("::")?.0;
            }
            let name = path[module.len()..].trim_start_matches("::").split("::").next();
            let shown = name.and_then(|name| self.shown.get(&(module.to_owned(), name.to_owned())));
            match shown {
                Some(shown) if *shown != path => path = shown.clone(),
                _ => return Some(module.to_owned()),
            }
        }
    }

    /// For each module those that it imports, by `use` or by a path in its code. A facade, which shows what is written
    /// below it, imports nothing by that.
    fn imports(&self) -> BTreeMap<&Module, BTreeSet<Module>> {
        let mut all = BTreeMap::new();
        for (module, code) in &self.code {
            let below = format!("{module}::");
            let mut paths: Vec<String> = Vec::new();
            for (is_shown, path) in uses(code) {
                let path = self.absolute(module, &path);
                paths.extend(path.filter(|path| !(is_shown && path.starts_with(&below))));
            }
            let inline = inline_paths(code);
            paths.extend(inline.iter().filter_map(|path| self.absolute(module, path)));
            let homes = paths.iter().filter_map(|path| self.home(path));
            all.insert(module, homes.filter(|home| home != module).collect());
        }
        all
    }
}

/// The text without comments, and strings empty.
fn bare(text: &str) -> String {
    let mut bare = String::new();
    for line in text.lines() {
        let mut in_string = false;
        let mut letters = line.char_indices().peekable();
        while let Some((at, letter)) = letters.next() {
            match letter {
                '\\' if in_string => {
                    letters.next();
                }
                '"' => in_string = !in_string,
                '/' if !in_string && line[at..].starts_with("//") => break,
                _ if in_string => {}
                _ => bare.push(letter),
            }
        }
        bare.push('\n');
    }
    bare
}

fn without_tests(code: &str) -> String {
    code.split("#[cfg(test)]\nmod ").next().unwrap_or_default().to_owned()
}

/// The paths of all `use` statements, one for each name, and whether others see it there.
fn uses(code: &str) -> Vec<(bool, String)> {
    let mut all = Vec::new();
    let mut from = 0;
    for line in code.split_inclusive('\n') {
        let (is_shown, statement) = match line.trim_start() {
            line if line.starts_with("use ") => (false, true),
            line if line.starts_with("pub") => (true, line.contains(" use ")),
            _ => (false, false),
        };
        if statement {
            let tree = code[from..].split_once("use ").map_or("", |(_, tree)| tree);
            let mut paths = Vec::new();
            leaves("", tree.split(';').next().unwrap_or_default(), &mut paths);
            all.extend(paths.into_iter().map(|path| (is_shown, path)));
        }
        from += line.len();
    }
    all
}

fn leaves(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let name = tree.split(" as ").next().unwrap_or_default().trim();
        let path = format!("{prefix}{name}");
        let path = path.trim_end_matches("::self").to_owned();
        if !name.is_empty() {
            paths.push(path);
        }
        return;
    };
    let inner = &tree[open + 1..tree.rfind('}').unwrap_or(tree.len())];
    let prefix = format!("{prefix}{}", &tree[..open]);
    let (mut depth, mut from) = (0, 0);
    for (at, letter) in inner.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                leaves(&prefix, &inner[from..at], paths);
                from = at + 1;
            }
            _ => {}
        }
    }
    leaves(&prefix, &inner[from..], paths);
}

/// `crate::a::b` and the like in the code.
fn inline_paths(code: &str) -> Vec<String> {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':';
    let is_use = |line: &&str| line.trim_start().starts_with("use ") || line.contains(" use ");
    code.lines()
        .filter(|line| !is_use(line))
        .flat_map(|line| line.split(move |letter| !is_part(letter)))
        .map(|path| path.trim_matches(':'))
        .filter(|path| ["crate::", "super::", "self::"].iter().any(|head| path.starts_with(head)))
        .map(str::to_owned)
        .collect()
}

fn folder(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

/// Those that cannot be ordered: each imports itself by way of others.
fn circles(imports: &BTreeMap<&Module, BTreeSet<Module>>) -> Vec<BTreeSet<Module>> {
    let reach = |from: &Module| {
        let mut seen: BTreeSet<Module> = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(module) = next.pop() {
            for other in imports.get(&module).into_iter().flatten() {
                if seen.insert(other.clone()) {
                    next.push(other.clone());
                }
            }
        }
        seen
    };
    let reached: BTreeMap<&Module, BTreeSet<Module>> =
        imports.keys().map(|module| (*module, reach(module))).collect();
    let circle = |module: &Module| -> BTreeSet<Module> {
        let is_back =
            |other: &&Module| reached.get(other).is_some_and(|back| back.contains(module));
        reached[module].iter().filter(is_back).cloned().collect()
    };
    let all: BTreeSet<BTreeSet<Module>> = imports.keys().map(|module| circle(module)).collect();
    all.into_iter().filter(|circle| circle.len() > 1).collect()
}

#[test]
fn no_circle_has_three_files_or_goes_across_folders() {
    let house = House::read();
    let is_knot = |circle: &BTreeSet<Module>| {
        let in_one_folder = circle.iter().map(|module| parent(module)).collect::<BTreeSet<_>>();
        let is_parent = circle.iter().any(|module| in_one_folder.contains(module.as_str()));
        circle.len() > 2 || (in_one_folder.len() > 1 && !is_parent)
    };
    let knots: Vec<_> = circles(&house.imports()).into_iter().filter(is_knot).collect();
    assert!(knots.is_empty(), "{knots:#?}");
}

fn parent(module: &str) -> &str {
    module.rsplit_once("::").map_or("", |(parent, _)| parent)
}

#[test]
fn each_folder_imports_only_what_is_below_it() {
    let house = House::read();
    let imports = house.imports();
    let mut wrong = Vec::new();
    for (from, never) in [
        ("discover", &["plan", "knobs", "attachment", "supervise", "check", "render", "cli"][..]),
        ("plan", &["discover", "knobs", "attachment", "supervise", "check", "render", "cli"]),
        ("knobs", &["attachment", "supervise", "check", "render", "cli"]),
        ("attachment", &["supervise", "check", "render", "cli"]),
        ("watch", &["attachment", "supervise", "check", "render", "cli"]),
        ("check", &["supervise", "cli"]),
        ("supervise", &["check", "render", "cli"]),
        ("render", &["cli"]),
    ] {
        for (module, imported) in imports.iter().filter(|(module, _)| folder(module) == from) {
            let bad = imported.iter().filter(|other| never.contains(&folder(other)));
            wrong.extend(bad.map(|other| format!("{module} imports {other}")));
        }
    }
    let has_clap =
        |(module, code): &(&Module, &String)| folder(module) != "cli" && has_word(code, "clap");
    wrong.extend(
        house.code.iter().filter(has_clap).map(|(module, _)| format!("{module} imports clap")),
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn is_planner(module: &str) -> bool {
    let is_plan = module.starts_with("knobs::") && module.split("::").any(|part| part == "plan");
    folder(module) == "plan" || is_plan || PLANNERS.contains(&module)
}

fn is_word(module: &str) -> bool {
    WORDS.iter().any(|word| {
        module.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    })
}

#[test]
fn planners_and_what_they_import_are_pure() {
    let house = House::read();
    let mut wrong: Vec<String> = PLANNERS
        .iter()
        .chain(&WORDS)
        .filter(|module| !house.code.contains_key(**module))
        .map(|module| format!("there is no {module}"))
        .collect();
    let imports = house.imports();
    let pure = |module: &&Module| is_planner(module) || is_word(module);
    for module in house.code.keys().filter(pure) {
        let words = IMPURE.iter().filter(|word| has_word(&house.code[module], word));
        wrong.extend(words.map(|word| format!("{module}: {word}")));
        let bad = imports[module].iter().filter(|other| !pure(other));
        wrong.extend(bad.map(|other| format!("{module} imports {other}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether the word stands in the code, and not as the end or beginning of another.
fn has_word(code: &str, word: &str) -> bool {
    let letter = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(letter) && !after.is_some_and(letter)
    })
}

#[test]
fn the_reader_of_sources_sees_what_is_written() {
    let code = bare(
        "use a::{b::{C, D as E}, self};\nlet x = \"use no::such;\"; // use no::comment;\npub use super::F;\n",
    );
    let found: Vec<(bool, String)> = uses(&code);
    let found: Vec<(bool, &str)> =
        found.iter().map(|(shown, path)| (*shown, path.as_str())).collect();
    assert_eq!(found, [(false, "a::b::C"), (false, "a::b::D"), (false, "a"), (true, "super::F")]);
    let [a, b, c] = ["a", "b", "c"].map(str::to_owned);
    let imports = BTreeMap::from([
        (&a, BTreeSet::from([b.clone()])),
        (&b, BTreeSet::from([c.clone()])),
        (&c, BTreeSet::from([a.clone()])),
    ]);
    assert_eq!(circles(&imports), [BTreeSet::from([a.clone(), b.clone(), c.clone()])]);
}
