//! The map as a picture. Everything says on hover what it is (`<title>`).
//!
//! For each reservation there is a bar to scale, on which what is used is mostly too small to be seen, and under it each
//! stripe, in which what is used is drawn large and long free ranges are cut out.

use super::page::{BREAK_WIDTH, Cell, Drawn, ROW_WIDTH, Rows};
use super::style::{Colours, OWN, tint};
use super::{Map, Piece, Reservation, Stripe, What, human, prot_name, short};
use std::fmt::Write;

const WIDTH: f64 = 1200.0;
const MARGIN: f64 = 28.0;
/// Where rows begin; addresses are left of them.
const LEFT: f64 = 122.0;
const ROW_HEIGHT: f64 = 30.0;
const ROW_STEP: f64 = 54.0;
/// Mean width of a character of the small text, in pixels.
const CHARACTER: f64 = 6.6;

/// The picture as a file of its own.
pub(super) fn document(map: &Map) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", picture(map))
}

/// The picture as an element.
pub(super) fn picture(map: &Map) -> String {
    let mut drawing = Drawing { out: String::new(), y: 0.0, colours: Colours::new(map), map };
    drawing.head();
    drawing.legend();
    for (number, reservation) in map.reservations.iter().enumerate() {
        drawing.reservation(number, reservation);
    }
    let height = drawing.y + 12.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         font-family=\"'DejaVu Sans',Verdana,system-ui,sans-serif\" font-size=\"11\">\n{DEFINITIONS}\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n{}</svg>\n",
        drawing.out
    )
}

/// Patterns: lines for what is lost, dots for what is free in pages that are in use.
const DEFINITIONS: &str = "<defs>\
    <pattern id=\"padding\" width=\"5\" height=\"5\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">\
    <rect width=\"5\" height=\"5\" fill=\"#fff\"/><rect width=\"2.4\" height=\"5\" fill=\"#333\"/></pattern>\
    <pattern id=\"rest\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\">\
    <rect width=\"6\" height=\"6\" fill=\"#f4f4f4\"/><circle cx=\"1.5\" cy=\"1.5\" r=\"0.9\" fill=\"#b0b0b0\"/>\
    <circle cx=\"4.5\" cy=\"4.5\" r=\"0.9\" fill=\"#b0b0b0\"/></pattern></defs>\n";

/// Replaces what has a meaning in XML, and what XML cannot have.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push('\n'),
            character if character.is_control() || matches!(character, '\u{fffe}' | '\u{ffff}') => {
                escaped.push('\u{fffd}')
            }
            character => escaped.push(character),
        }
    }
    escaped
}

/// Shortens a name to a number of characters by leaving out its middle.
fn fit(name: &str, characters: usize) -> String {
    let all: Vec<char> = name.chars().collect();
    if all.len() <= characters {
        return name.to_owned();
    }
    let half = characters.saturating_sub(1) / 2;
    let (start, end) = (&all[..half], &all[all.len() - half..]);
    start.iter().chain(&['…']).chain(end).collect()
}

struct Drawing<'a> {
    out: String,
    y: f64,
    colours: Colours,
    map: &'a Map,
}

impl Drawing<'_> {
    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.out.write_fmt(element);
        self.out.push('\n');
    }

    fn text(&mut self, x: f64, y: f64, attributes: &str, text: &str) {
        self.add(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" {attributes}>{}</text>", escape(text)));
    }

    /// Adds a box that says what it is on hover.
    fn rect(&mut self, (x, y, width, height): (f64, f64, f64, f64), attributes: &str, title: &str) {
        let title = escape(title);
        self.add(format_args!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" {attributes}>\
             <title>{title}</title></rect>"
        ));
    }

    fn head(&mut self) {
        let map = self.map;
        let is_own = |what: &What| *what == What::Other(super::OWN);
        let used = map.sum(|what| is_live(what) && !is_own(what));
        let (own, padding) = (map.sum(is_own), map.sum(|what| *what == What::Padding));
        let rest = map.sum(|what| *what == What::RestOfPage);
        let reserved: u64 = map.reservations.iter().map(|reservation| reservation.range.len()).sum();
        let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        self.y = 38.0;
        self.text(MARGIN, self.y, "font-size=\"20\" font-weight=\"bold\" fill=\"#111\"", "Memory of the executor");
        let set_aside =
            if own == 0 { String::new() } else { format!(", {} set aside for farlink's own tables", human(own)) };
        let first = format!(
            "{} in {} of {}: {} used{set_aside}",
            plural(map.objects.len(), "object"),
            plural(map.reservations.len(), "reservation"),
            human(reserved),
            human(used),
        );
        let percent = |part: u64| part as f64 * 100.0 / ((used + rest) as f64).max(1.0);
        let committed = map.committed_bytes.map(|bytes| format!("; {} of physical memory", human(bytes)));
        let second = format!(
            "Lost: {} ({:.1} %) to alignment, {} ({:.1} %) at the ends of pages{}",
            human(padding),
            percent(padding),
            human(rest),
            percent(rest),
            committed.unwrap_or_default(),
        );
        self.text(MARGIN, self.y + 24.0, "font-size=\"13\" fill=\"#333\"", &first);
        self.text(MARGIN, self.y + 42.0, "font-size=\"13\" fill=\"#333\"", &second);
        self.y += 66.0;
    }

    /// Says what colours and patterns mean.
    fn legend(&mut self) {
        let map = self.map;
        let mut entries: Vec<(String, String, String)> = Vec::new();
        for &index in &self.colours.largest {
            let object = &map.objects[index];
            let label = format!("{} {}", fit(short(&object.name), 30), human(object.total()));
            entries.push((self.colours.object(index).0.to_owned(), label, object.name.clone()));
        }
        if map.objects.len() > self.colours.largest.len() {
            let more = map.objects.len() - self.colours.largest.len();
            entries.push(("#b9c2cc".to_owned(), format!("{more} other objects"), "two greys by turns".to_owned()));
        }
        let kinds = [
            (What::Other(""), OWN.0, "farlink's own, buffers, and what several objects have together"),
            (What::Padding, "url(#padding)", "lost to alignment"),
            (What::RestOfPage, "url(#rest)", "free, in a page that is in use"),
        ];
        for (kind, fill, label) in kinds {
            let is_it = |piece: &Piece| std::mem::discriminant(&piece.what) == std::mem::discriminant(&kind);
            if map.pieces().any(is_it) {
                entries.push((fill.to_owned(), label.to_owned(), label.to_owned()));
            }
        }
        let mut x = MARGIN;
        for (fill, label, title) in entries {
            let width = 22.0 + label.chars().count() as f64 * CHARACTER + 18.0;
            if x + width > WIDTH - MARGIN {
                x = MARGIN;
                self.y += 20.0;
            }
            let swatch = format!("fill=\"{fill}\" stroke=\"#555\" stroke-width=\"0.6\"");
            self.rect((x, self.y - 10.0, 15.0, 12.0), &swatch, &title);
            self.text(x + 21.0, self.y, "fill=\"#222\"", &label);
            x += width;
        }
        self.y += 26.0;
    }

    fn reservation(&mut self, number: usize, reservation: &Reservation) {
        let purpose = if reservation.is_for_buffers { " for buffers" } else { "" };
        let range = reservation.range;
        let title = format!("Reservation {}{purpose}: {} at {}", number + 1, human(range.len()), range.start());
        self.y += 12.0;
        self.text(MARGIN, self.y, "font-size=\"15\" font-weight=\"bold\" fill=\"#111\"", &title);
        self.y += 10.0;
        self.bar(reservation);
        for stripe in &reservation.stripes {
            self.stripe(stripe);
        }
        self.y += 8.0;
    }

    /// Draws a whole reservation to scale.
    fn bar(&mut self, reservation: &Reservation) {
        let (start, bytes) = (reservation.range.start().as_u64(), reservation.range.len() as f64);
        let width = LEFT + ROW_WIDTH - MARGIN;
        let place = |addr: u64| MARGIN + (addr - start) as f64 / bytes * width;
        let whole = "fill=\"#eee\" stroke=\"#999\" stroke-width=\"0.6\"";
        self.rect((MARGIN, self.y, width, 24.0), whole, "no access");
        for stripe in &reservation.stripes {
            let (left, right) = (place(stripe.range.start().as_u64()), place(stripe.range.end().as_u64()));
            let fill = format!("fill=\"{}\" stroke=\"#999\" stroke-width=\"0.6\"", tint(stripe.prot));
            let title = format!("{}: {}", stripe_name(stripe), stripe.range);
            self.rect((left, self.y, right - left, 24.0), &fill, &title);
            let label = format!("{} {}", stripe_name(stripe), human(stripe.range.len()));
            let attributes = "fill=\"#333\" text-anchor=\"middle\" pointer-events=\"none\"";
            self.text((left + right) / 2.0, self.y + 16.0, attributes, &label);
            for (first, last) in used_runs(&stripe.pieces) {
                let (left, right) = (place(first), place(last));
                let title = format!("{} used", human(last - first));
                self.rect((left, self.y, (right - left).max(2.0), 24.0), "fill=\"#222\"", &title);
            }
        }
        self.text(MARGIN, self.y + 37.0, "fill=\"#777\" font-size=\"10\"", "to scale; black is used");
        self.y += 44.0;
    }

    fn stripe(&mut self, stripe: &Stripe) {
        let used: u64 = stripe.pieces.iter().filter(|piece| is_live(&piece.what)).map(|piece| piece.range.len()).sum();
        let rows = Rows::new(&stripe.pieces);
        let rows =
            if used == 0 { Vec::new() } else { rows.rows.into_iter().map(|row| (row, rows.bytes_per_pixel)).collect() };
        let top = self.y;
        let height = 34.0 + rows.len() as f64 * ROW_STEP + if rows.is_empty() { -6.0 } else { 2.0 };
        let panel = format!("fill=\"{}\" fill-opacity=\"0.45\"", tint(stripe.prot));
        self.rect((MARGIN, top, LEFT + ROW_WIDTH - MARGIN + 10.0, height), &panel, &stripe.range.to_string());
        let title = format!("{}, {}", stripe_name(stripe), stripe.range);
        self.text(
            MARGIN + 10.0,
            top + 19.0,
            "font-size=\"12\" font-weight=\"bold\" fill=\"#222\" pointer-events=\"none\"",
            &title,
        );
        let scale = rows
            .first()
            .map_or(String::new(), |&(_, scale)| format!("; 100 pixels are {}", human((scale * 100.0) as u64)));
        let summary = if used == 0 {
            "nothing in it".to_owned()
        } else {
            format!("{} used, {} free{scale}", human(used), human(stripe.range.len() - used))
        };
        let right = "text-anchor=\"end\" fill=\"#444\" pointer-events=\"none\"";
        self.text(LEFT + ROW_WIDTH, top + 19.0, right, &summary);
        self.y = top + 34.0;
        for (row, bytes_per_pixel) in &rows {
            self.row(stripe, row, *bytes_per_pixel);
        }
        self.y = top + height + 10.0;
    }

    fn row(&mut self, stripe: &Stripe, row: &[Cell], bytes_per_pixel: f64) {
        let start = stripe.range.start().as_u64();
        let offset =
            |cell: &Cell| first_piece(cell, &stripe.pieces).range.start().as_u64() - start + cell.skipped as u64;
        if let Some(cell) = row.first() {
            let label = format!("+{:#x}", offset(cell));
            let attributes = "text-anchor=\"end\" fill=\"#555\" pointer-events=\"none\"";
            self.text(LEFT - 8.0, self.y + ROW_HEIGHT / 2.0 + 4.0, attributes, &label);
        }
        let mut last_label = LEFT - 40.0;
        for cell in row {
            match cell.drawn {
                Drawn::Piece(index) => self.piece(&stripe.pieces[index], cell),
                Drawn::Several(first, end) => self.several(&stripe.pieces[first..end], cell),
                Drawn::Break(index) => self.cut(&stripe.pieces[index], cell),
            }
            if !matches!(cell.drawn, Drawn::Break(_)) {
                self.ticks(offset(cell), cell, bytes_per_pixel, &mut last_label);
            }
        }
        self.y += ROW_STEP;
    }

    /// Marks where pages begin.
    fn ticks(&mut self, offset: u64, cell: &Cell, bytes_per_pixel: f64, last_label: &mut f64) {
        let page = self.map.page_bytes;
        let step = page * ((7.0 * bytes_per_pixel / page as f64).ceil().max(1.0) as u64);
        let end = offset + (cell.width * bytes_per_pixel) as u64;
        for at in (offset.next_multiple_of(step)..end).step_by(step as usize) {
            let x = LEFT + cell.x + (at - offset) as f64 / bytes_per_pixel;
            let (top, bottom) = (self.y + ROW_HEIGHT, self.y + ROW_HEIGHT + 5.0);
            self.add(format_args!("<path d=\"M{x:.1} {top:.1}V{bottom:.1}\" stroke=\"#777\"/>"));
            let label = format!("+{at:#x}");
            if x - *last_label >= label.len() as f64 * CHARACTER + 8.0
                && x + label.len() as f64 * CHARACTER < LEFT + ROW_WIDTH
            {
                self.text(x + 2.0, bottom + 5.0, "font-size=\"9\" fill=\"#777\" pointer-events=\"none\"", &label);
                *last_label = x;
            }
        }
    }

    fn piece(&mut self, piece: &Piece, cell: &Cell) {
        let (fill, ink) = self.colours.piece(&piece.what);
        let (x, width) = (LEFT + cell.x, cell.width);
        let object = match piece.what {
            What::Section { object, .. } => format!(" data-o=\"{object}\""),
            _ => String::new(),
        };
        let stroke = if width > 3.0 { "stroke=\"#fff\" stroke-width=\"0.8\"" } else { "" };
        let attributes = format!("fill=\"{fill}\" {stroke}{object}");
        let title = self.title(piece);
        self.rect((x, self.y, width, ROW_HEIGHT), &attributes, &title);
        if let Some((first, second)) = self.labels(piece, width) {
            let attributes = format!("fill=\"{ink}\" text-anchor=\"middle\" pointer-events=\"none\"");
            let middle = x + width / 2.0;
            if second.is_empty() {
                self.text(middle, self.y + 19.0, &attributes, &first);
            } else {
                self.text(middle, self.y + 13.0, &attributes, &first);
                self.text(middle, self.y + 25.0, &format!("{attributes} font-size=\"10\" opacity=\"0.85\""), &second);
            }
        }
    }

    /// Returns what is written in a box of that width, in two lines, if anything fits.
    fn labels(&self, piece: &Piece, width: f64) -> Option<(String, String)> {
        let room = ((width - 6.0) / CHARACTER).floor().max(0.0) as usize;
        let (first, second) = match &piece.what {
            What::Section { object, section } => {
                (short(&self.map.objects[*object].name), section.as_deref().unwrap_or_default())
            }
            What::Other(what) => (*what, ""),
            _ => return None,
        };
        let length = first.chars().count();
        if room < 4 || length > room && room < 7 {
            return None;
        }
        let second = if second.chars().count() <= room { second.to_owned() } else { String::new() };
        Some((fit(first, room), second))
    }

    fn title(&self, piece: &Piece) -> String {
        let what = match &piece.what {
            What::Section { object, section: Some(section) } => {
                format!("{}\n{section}", self.map.objects[*object].name)
            }
            What::Section { object, section: None } => self.map.objects[*object].name.clone(),
            What::Padding => "lost to alignment".to_owned(),
            What::Other(what) => (*what).to_owned(),
            What::RestOfPage => "free, in a page that is in use".to_owned(),
            What::Free => "free".to_owned(),
        };
        let bytes = piece.range.len();
        let exact = if bytes < 1024 { String::new() } else { format!(" ({bytes} bytes)") };
        format!("{what}\n{}{exact}\n{}", human(bytes), piece.range)
    }

    /// Draws pieces that are too narrow to be told apart.
    fn several(&mut self, pieces: &[Piece], cell: &Cell) {
        let longest = pieces.iter().filter(|piece| is_live(&piece.what)).max_by_key(|piece| piece.range.len());
        let longest = longest.unwrap_or(&pieces[0]);
        let object = match longest.what {
            What::Section { object, .. } => format!(" data-o=\"{object}\""),
            _ => String::new(),
        };
        let fill = self.colours.piece(&longest.what).0;
        let stroke = if cell.width > 3.0 { "stroke=\"#fff\" stroke-width=\"0.8\"" } else { "" };
        let title = self.title_of_several(pieces);
        let attributes = format!("fill=\"{fill}\" {stroke}{object}");
        self.rect((LEFT + cell.x, self.y, cell.width, ROW_HEIGHT), &attributes, &title);
    }

    fn title_of_several(&self, pieces: &[Piece]) -> String {
        const NAMED: usize = 12;
        let bytes: u64 = pieces.iter().map(|piece| piece.range.len()).sum();
        let section = |piece: &Piece| match &piece.what {
            What::Section { object, section } => {
                Some((*object, section.clone().unwrap_or_default(), piece.range.len()))
            }
            _ => None,
        };
        let sections: Vec<_> = pieces.iter().filter_map(section).collect();
        let is_one = sections.iter().all(|(object, ..)| *object == sections[0].0);
        let mut title = match sections.first() {
            Some((object, ..)) if is_one => self.map.objects[*object].name.clone(),
            _ => format!("{} pieces", pieces.len()),
        };
        title += &format!("\n{}", human(bytes));
        for (object, section, bytes) in sections.iter().take(NAMED) {
            let name = if is_one { "" } else { short(&self.map.objects[*object].name) };
            title += &format!("\n{name} {section}: {}", human(*bytes));
        }
        if sections.len() > NAMED {
            title += &format!("\nand {} more", sections.len() - NAMED);
        }
        title
    }

    /// Draws the mark for memory that is cut out: a gap with torn edges, and how long it is.
    fn cut(&mut self, piece: &Piece, cell: &Cell) {
        let (x, y) = (LEFT + cell.x, self.y);
        let title = self.title(piece);
        let (fill, ink, what) = match piece.what {
            What::RestOfPage => ("#f0f0f0", "#555", "of a page"),
            What::Other(_) => (OWN.0, OWN.1, "own"),
            _ => ("#fff", "#555", "free"),
        };
        self.rect((x + 6.5, y, BREAK_WIDTH - 13.0, ROW_HEIGHT), &format!("fill=\"{fill}\""), &title);
        let step = ROW_HEIGHT / 4.0;
        for edge in [x + 5.0, x + BREAK_WIDTH - 8.0] {
            self.add(format_args!(
                "<path d=\"M{edge:.1} {y:.1}l3 {step}l-3 {step}l3 {step}l-3 {step}\" fill=\"none\" stroke=\"#888\" \
                 stroke-width=\"1.1\"/>"
            ));
        }
        let attributes = format!("text-anchor=\"middle\" fill=\"{ink}\" pointer-events=\"none\"");
        let middle = x + BREAK_WIDTH / 2.0;
        self.text(middle, y + 13.0, &attributes, &human(piece.range.len()));
        self.text(middle, y + 25.0, &format!("{attributes} font-size=\"10\""), what);
    }
}

fn stripe_name(stripe: &Stripe) -> String {
    match stripe.prot {
        Some(prot) => format!("{} {prot}", prot_name(Some(prot))),
        None => prot_name(None).to_owned(),
    }
}

fn first_piece<'a>(cell: &Cell, pieces: &'a [Piece]) -> &'a Piece {
    match cell.drawn {
        Drawn::Piece(index) | Drawn::Break(index) | Drawn::Several(index, _) => &pieces[index],
    }
}

fn is_live(what: &What) -> bool {
    !matches!(what, What::Free | What::RestOfPage)
}

/// Returns where runs of pages in use begin and end.
fn used_runs(pieces: &[Piece]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.what != What::Free) {
        let (start, end) = (piece.range.start().as_u64(), piece.range.end().as_u64());
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}
