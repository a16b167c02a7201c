//! Tables of plain columns, drawn by `comfy-table`.

use comfy_table::{ColumnConstraint, Table, Width, presets};

use crate::shown;

/// How many rows are laid out at once: each takes some kilobytes then, and a VM may have very many threads.
const ROWS_AT_A_TIME: usize = 500;

/// Columns as wide as they need to be, two spaces apart; the first row is the head. Hidden characters are escaped, so
/// that each is as wide as it looks.
pub(super) fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = vec![0; COLUMNS];
    for some in rows.chunks(ROWS_AT_A_TIME) {
        let of_some = part(some).column_max_content_widths();
        widths = widths.into_iter().zip(of_some).map(|(all, some)| all.max(some)).collect();
    }
    let mut text = String::new();
    for some in rows.chunks(ROWS_AT_A_TIME) {
        let mut table = part(some);
        for (column, width) in table.column_iter_mut().zip(&widths) {
            let width = width.saturating_add(column.padding_width());
            column.set_constraint(ColumnConstraint::Absolute(Width::Fixed(width)));
        }
        let lines = table.to_string();
        text.extend(lines.lines().flat_map(|line| [line.trim_end(), "\n"]));
    }
    text
}

fn part<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for row in rows {
        table.add_row(row.each_ref().map(|cell| shown::line(cell).into_owned()));
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((u16::from(at != 0), 1));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_long_table_are_as_wide_in_every_part() {
        let mut rows = vec![["NAME".to_owned(), "VALUE".to_owned()]];
        rows.extend((0..2 * ROWS_AT_A_TIME).map(|at| ["a".repeat(1 + at % 30), at.to_string()]));
        let text = table(&rows);
        assert_eq!(text.lines().count(), rows.len());
        let width = 30;
        for (line, [name, value]) in text.lines().zip(&rows) {
            assert_eq!(line, format!("{name:width$}  {value}"));
        }
        assert_eq!(table::<2>(&[]), "");
    }
}
