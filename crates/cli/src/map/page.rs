//! From the pieces of a stripe to rows of boxes: what is used is drawn to one scale, and long free ranges are cut out.

use super::{OWN, Piece, What};

/// Width of a row in pixels.
pub(super) const ROW_WIDTH: f64 = 1050.0;

/// Width of the mark for what has been cut out.
pub(super) const BREAK_WIDTH: f64 = 74.0;

/// Rows of one stripe.
const MAX_ROWS: f64 = 14.0;

/// Cuts in one stripe.
const MAX_BREAKS: usize = 24;

/// A piece should be about this wide, so that a name fits. Some are wider and some are narrower: the scale is one.
const USUAL_WIDTH: f64 = 34.0;

/// What is drawn in a row.
pub(super) enum Drawn {
    /// A piece, by its number, or a part of it that fits in the row.
    Piece(usize),
    /// Several pieces that are too narrow to be told apart: the first, and one after the last.
    Several(usize, usize),
    /// Memory that is not drawn to scale.
    Break(usize),
}

/// Something in a row, with its place in pixels.
pub(super) struct Cell {
    pub(super) x: f64,
    pub(super) width: f64,
    pub(super) drawn: Drawn,
    /// Bytes from the beginning of the piece to what is drawn here.
    pub(super) skipped: f64,
}

/// The rows of a stripe.
pub(super) struct Rows {
    pub(super) rows: Vec<Vec<Cell>>,
    /// Bytes for each pixel.
    pub(super) bytes_per_pixel: f64,
}

impl Rows {
    /// Lays out the pieces of a stripe.
    pub(super) fn new(pieces: &[Piece]) -> Self {
        let is_break = breaks(pieces);
        let count = is_break.iter().filter(|&&is_break| is_break).count() as f64;
        let drawn = || pieces.iter().zip(&is_break).filter(|&(_, is_break)| !is_break).map(|(piece, _)| piece);
        let bytes: u64 = drawn().map(|piece| piece.range.len()).sum();
        if bytes == 0 {
            return Self { rows: fill(pieces, &is_break, 1.0), bytes_per_pixel: 1.0 };
        }
        let mut sizes: Vec<u64> = drawn()
            .filter(|piece| matches!(piece.what, What::Section { .. } | What::Other(_)))
            .map(|piece| piece.range.len())
            .collect();
        sizes.sort_unstable();
        let usual = sizes.get(sizes.len() / 2).copied().unwrap_or(bytes).max(1);
        let cuts = count * BREAK_WIDTH;
        let wanted = bytes as f64 * USUAL_WIDTH / usual as f64 + cuts;
        let most = MAX_ROWS.max((2.0 * cuts / ROW_WIDTH).ceil());
        let wanted_rows = (wanted / ROW_WIDTH).ceil().clamp(1.0, most);
        let mut bytes_per_pixel = bytes as f64 / (wanted_rows * ROW_WIDTH - cuts).max(ROW_WIDTH / 4.0);
        loop {
            let rows = fill(pieces, &is_break, bytes_per_pixel);
            // A cut that does not fit at the end of a row leaves a gap there, and may lead to one row more.
            if rows.len() as f64 <= wanted_rows || bytes_per_pixel > bytes as f64 {
                return Self { rows, bytes_per_pixel };
            }
            bytes_per_pixel *= 1.02;
        }
    }
}

/// Says which pieces are cut out: those that nobody misses and that are long beside what is used.
fn breaks(pieces: &[Piece]) -> Vec<bool> {
    let shown = pieces.iter().filter(|piece| !can_cut(piece)).map(|piece| piece.range.len());
    let mut longest = shown.sum::<u64>() / 12;
    loop {
        let found: Vec<bool> = pieces.iter().map(|piece| can_cut(piece) && piece.range.len() > longest).collect();
        if found.iter().filter(|&&is_break| is_break).count() <= MAX_BREAKS {
            return found;
        }
        longest = longest.saturating_mul(2).max(16);
    }
}

fn object(piece: &Piece) -> Option<usize> {
    match piece.what {
        What::Section { object, .. } => Some(object),
        _ => None,
    }
}

/// Whether what begins here is of this object, or padding before more of it.
fn goes_on(pieces: &[Piece], of: Option<usize>) -> bool {
    let mut pieces = pieces.iter().filter(|piece| piece.what != What::Padding);
    pieces.next().is_some_and(|piece| object(piece) == of)
}

/// Whether nobody misses a piece: it is free, or a table that is mostly not filled.
fn can_cut(piece: &Piece) -> bool {
    matches!(piece.what, What::Free | What::RestOfPage | What::Other(OWN))
}

fn fill(pieces: &[Piece], is_break: &[bool], bytes_per_pixel: f64) -> Vec<Vec<Cell>> {
    /// What is narrower is drawn together with its neighbours, up to so many pixels.
    const NARROW: f64 = 1.2;
    const NARROW_TOGETHER: f64 = 4.0;
    /// What is narrower is drawn together with its neighbours of the same object.
    const SMALL: f64 = 8.0;
    let (mut rows, mut row, mut x) = (Vec::new(), Vec::new(), 0.0);
    let mut index = 0;
    while index < pieces.len() {
        if is_break[index] {
            if x + BREAK_WIDTH > ROW_WIDTH + 0.5 {
                rows.push(std::mem::take(&mut row));
                x = 0.0;
            }
            row.push(Cell { x, width: BREAK_WIDTH, drawn: Drawn::Break(index), skipped: 0.0 });
            x += BREAK_WIDTH;
            index += 1;
            continue;
        }
        let width = |index: usize| pieces[index].range.len() as f64 / bytes_per_pixel;
        let (mut end, mut left) = (index + 1, width(index));
        let object = object(&pieces[index]);
        while end < pieces.len() && !is_break[end] {
            let is_narrow = left < NARROW_TOGETHER && width(index).max(width(end)) < NARROW;
            let is_same = object.is_some() && width(index).max(width(end)) < SMALL && goes_on(&pieces[end..], object);
            if !is_narrow && !is_same {
                break;
            }
            left += width(end);
            end += 1;
        }
        let mut skipped = 0.0;
        while left > 0.01 {
            if ROW_WIDTH - x < 0.5 {
                rows.push(std::mem::take(&mut row));
                x = 0.0;
            }
            let width = left.min(ROW_WIDTH - x);
            let drawn = if end == index + 1 { Drawn::Piece(index) } else { Drawn::Several(index, end) };
            row.push(Cell { x, width, drawn, skipped });
            (x, left, skipped) = (x + width, left - width, skipped + width * bytes_per_pixel);
        }
        index = end;
    }
    rows.push(row);
    rows
}
