//! Every placement of a guest on the CPUs that it may have, and the best of them.

use super::ground::{Ground, Mask, RULES, Score};

/// The best placement.
pub(super) struct Found {
    pub(super) score: Score,
    /// The CPUs of each guest core.
    pub(super) on: Vec<Mask>,
    /// How often each rule was the first in which another placement differed from the best so far.
    pub(super) decided: [usize; RULES.len()],
}

/// What is left out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Prune {
    /// Placements that differ from another only by CPUs, cores or guest cores that no rule tells apart.
    Alike,
    Nothing,
}

/// Tries all placements. `None`: there is none.
pub(super) fn search(ground: &Ground, prune: Prune) -> Option<Found> {
    let mut search =
        Search { ground, prune, alike: Alike::of(ground), on: Vec::new(), found: None };
    search.place(0, 0);
    search.found
}

/// Which CPUs and cores no rule tells apart: those with equal numbers.
struct Alike {
    /// For each CPU its core.
    core_of: Vec<usize>,
    cpus: Vec<u32>,
    cores: Vec<usize>,
}

impl Alike {
    fn of(ground: &Ground) -> Alike {
        let on = |core: Mask| (0..ground.cpus.len()).filter(move |at| core >> at & 1 != 0);
        let cpus: Vec<u32> = (0..ground.cpus.len()).map(|at| ground.signs(at)).collect();
        let signs = |core: &Mask| {
            let threads: Vec<u32> = on(*core).map(|at| cpus[at]).collect();
            (ground.place(*core), threads)
        };
        let signs: Vec<_> = ground.cores.iter().map(signs).collect();
        let first = |one: &_| signs.iter().position(|other| other == one).expect("itself");
        let core_of = |at: usize| {
            let is_here = |core: &Mask| core >> at & 1 != 0;
            ground.cores.iter().position(is_here).expect("every CPU is of a core")
        };
        Alike {
            core_of: (0..ground.cpus.len()).map(core_of).collect(),
            cores: signs.iter().map(first).collect(),
            cpus,
        }
    }

    /// Whether no unused CPU that is alike comes before this one: of the same core, or on a core without any use.
    fn is_first(&self, ground: &Ground, at: usize, used: Mask) -> bool {
        let core = self.core_of[at];
        let is_unused_like = |other: usize| {
            self.core_of[other] == core
                && used >> other & 1 == 0
                && self.cpus[other] == self.cpus[at]
        };
        if (0..at).any(is_unused_like) {
            return false;
        }
        let is_untouched = |core: usize| ground.cores[core] & used == 0;
        let is_like = |other: usize| self.cores[other] == self.cores[core] && is_untouched(other);
        !is_untouched(core) || !(0..core).any(is_like)
    }
}

struct Search<'a> {
    ground: &'a Ground,
    prune: Prune,
    alike: Alike,
    on: Vec<Mask>,
    found: Option<Found>,
}

impl Search<'_> {
    /// Places the guest core of that number, and those after it.
    fn place(&mut self, at: usize, used: Mask) {
        let Some(core) = self.ground.guest.get(at).copied() else { return self.judge() };
        let prunes = self.prune == Prune::Alike;
        // Guest cores that are alike go by their first CPUs, and siblings by theirs.
        let before = at.checked_sub(1).filter(|before| self.ground.guest[*before] == core);
        let before = before.filter(|_| prunes).map(|before| self.on[before].trailing_zeros());
        let from = before.map_or(0, |cpu| cpu as usize + 1);
        let cpus = self.ground.cpus.len();
        for first in from..cpus {
            if !self.may_take(first, used) {
                continue;
            }
            let one = 1 << first;
            if core.vcpus == 1 {
                self.put(at, one, used);
                continue;
            }
            for second in first + 1..cpus {
                if self.may_take(second, used | one) {
                    self.put(at, one | 1 << second, used);
                }
            }
        }
    }

    fn may_take(&self, cpu: usize, used: Mask) -> bool {
        let is_free = (self.ground.free & !used) >> cpu & 1 != 0;
        is_free && (self.prune == Prune::Nothing || self.alike.is_first(self.ground, cpu, used))
    }

    fn put(&mut self, at: usize, cpus: Mask, used: Mask) {
        self.on.push(cpus);
        self.place(at + 1, used | cpus);
        self.on.pop();
    }

    fn judge(&mut self) {
        let score = self.ground.score(&self.on);
        let Some(best) = &mut self.found else {
            let on = self.on.clone();
            self.found = Some(Found { score, on, decided: [0; RULES.len()] });
            return;
        };
        if let Some(rule) = score.first_difference(&best.score) {
            best.decided[rule] += 1;
        }
        if score < best.score {
            best.score = score;
            best.on.clone_from(&self.on);
        }
    }
}
