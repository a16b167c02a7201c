//! Samples, and the table they end in.

use std::fmt;
use std::time::Duration;

/// Times of one variant.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    sorted_ms: Vec<f64>,
}

impl Samples {
    pub(crate) fn add(&mut self, time: Duration) {
        let time_ms = time.as_secs_f64() * 1e3;
        let at = self.sorted_ms.partition_point(|earlier| *earlier < time_ms);
        self.sorted_ms.insert(at, time_ms);
    }

    pub(crate) fn median_ms(&self) -> f64 {
        self.quantile_ms(50)
    }

    pub(crate) fn p95_ms(&self) -> f64 {
        self.quantile_ms(95)
    }

    pub(crate) fn max_ms(&self) -> f64 {
        self.quantile_ms(100)
    }

    fn quantile_ms(&self, percent: usize) -> f64 {
        let last = self.sorted_ms.len().saturating_sub(1);
        self.sorted_ms.get(last * percent / 100).copied().unwrap_or(f64::NAN)
    }

    /// Median and 95th percentile.
    fn in_words(&self) -> String {
        format!("{} ({})", ms(self.median_ms()), ms(self.p95_ms()))
    }
}

/// Milliseconds with three digits that say something.
pub(crate) fn ms(time_ms: f64) -> String {
    match time_ms {
        t if t < 1.0 => format!("{t:.3} ms"),
        t if t < 10.0 => format!("{t:.2} ms"),
        t => format!("{t:.1} ms"),
    }
}

/// The table.
#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<[String; 5]>,
}

impl Table {
    /// A row of words.
    pub(crate) fn row(&mut self, what: &str, ours: &str, theirs: &str, result: &str, target: &str) {
        self.rows.push([what, ours, theirs, result, target].map(str::to_owned));
    }

    /// At most so many times as long as another.
    pub(crate) fn at_most(&mut self, what: &str, ours: &Samples, theirs: &Samples, target: &str) {
        let ratio = ours.median_ms() / theirs.median_ms();
        self.row(what, &ours.in_words(), &theirs.in_words(), &format!("{ratio:.2} x"), target);
    }

    /// So many times faster than another.
    pub(crate) fn faster(&mut self, what: &str, ours: &Samples, theirs: &Samples, target: &str) {
        let ratio = theirs.median_ms() / ours.median_ms();
        let result = format!("{ratio:.0} x faster");
        self.row(what, &ours.in_words(), &theirs.in_words(), &result, target);
    }

    /// Nothing to compare with.
    pub(crate) fn alone(&mut self, what: &str, ours: &Samples, target: &str) {
        let worst = format!("worst {}", ms(ours.max_ms()));
        self.row(what, &ours.in_words(), "", &worst, target);
    }

    pub(crate) fn skipped(&mut self, what: &str, why: &str) {
        self.row(what, "", "", &format!("skipped: {why}"), "");
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["measured: median (p95)", "qmpin", "compared with", "result", "target"];
        let lines: Vec<[String; 5]> =
            std::iter::once(head.map(str::to_owned)).chain(self.rows.iter().cloned()).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
        let widths = [0, 1, 2, 3, 4].map(|column| width(column).unwrap_or(0));
        for line in &lines {
            let mut text = String::new();
            for (cell, width) in line.iter().zip(widths) {
                text.push_str(&format!("{cell:width$}  "));
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}
