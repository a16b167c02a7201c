//! Tables of plain columns, drawn by `comfy-table`.

use comfy_table::{Table, presets};

use crate::shown;

/// Columns as wide as they need to be, two spaces apart; the first row is the head. Hidden characters are escaped, so
/// that each is as wide as it looks.
pub(super) fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for row in rows {
        table.add_row(row.each_ref().map(|cell| shown::line(cell).into_owned()));
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((u16::from(at != 0), 1));
    }
    let text = table.to_string();
    text.lines().flat_map(|line| [line.trim_end(), "\n"]).collect()
}
