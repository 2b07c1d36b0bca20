//! What is printed for people: in colours where those are seen, in lines that fit.

use std::io::{self, IsTerminal, Write};

/// Columns of text that is wrapped: what most terminals have, and what reads well.
pub(crate) const WIDTH: usize = 100;

/// Colours, on a terminal.
#[derive(Clone, Copy)]
pub(crate) struct Paint(bool);

impl Paint {
    /// Paints if `stream` is a terminal that shows colours.
    pub(crate) fn on(stream: &impl IsTerminal) -> Self {
        let is_dumb = std::env::var_os("TERM").is_some_and(|name| name == "dumb");
        Self(stream.is_terminal() && !is_dumb && std::env::var_os("NO_COLOR").is_none())
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    pub(crate) fn cyan(self, text: &str) -> String {
        self.with("36", text)
    }
}

/// Divides text into lines that have at most `columns`, unless a word is longer.
pub(crate) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut length = 0;
    for word in text.split_whitespace() {
        let word_length = word.chars().count();
        if length > 0 && length + 1 + word_length > columns {
            lines.push(String::new());
            length = 0;
        }
        let line = lines.last_mut().expect("there is a line from the beginning");
        if length > 0 {
            line.push(' ');
            length += 1;
        }
        line.push_str(word);
        length += word_length;
    }
    lines
}

/// Prints an error: as a report on a terminal, else in plain lines.
pub(crate) fn print_error(error: &impl ToString) {
    let stderr = io::stderr();
    let text = error.to_string();
    if !stderr.is_terminal() {
        eprintln!("farlink: {text}");
        return;
    }
    // There is nobody to be told that this cannot be printed.
    let _ = report(&mut stderr.lock(), &text, Paint::on(&stderr), has_unicode());
}

/// Whether the terminal shows more than ASCII, by what the locale says.
fn has_unicode() -> bool {
    let locale =
        ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(std::env::var_os).find(|value| !value.is_empty());
    locale.is_some_and(|locale| {
        let locale = locale.to_string_lossy().to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Prints the parts of an error under each other: what is wrong, what it is about (indented lines), and the way out, which
/// messages have after a semicolon, or in a line of its own.
fn report(out: &mut impl Write, text: &str, paint: Paint, unicode: bool) -> io::Result<()> {
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let (what, way_out) = first.split_once("; ").unwrap_or((first, ""));
    let (about, more): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with(' '));
    let [cross, middle, last] = if unicode { ["×", "├─", "╰─"] } else { ["x", "|-", "`-"] };
    let columns = WIDTH - 4;
    for (position, line) in wrap(what, columns).iter().enumerate() {
        let mark = if position == 0 { paint.red(cross) } else { " ".to_owned() };
        writeln!(out, "  {mark} {}", paint.bold(line))?;
    }
    for (position, item) in about.iter().enumerate() {
        let mark = if position + 1 == about.len() { last } else { middle };
        writeln!(out, "  {} {}", paint.dim(mark), item.trim())?;
    }
    for help in [way_out].into_iter().chain(more).filter(|help| !help.trim().is_empty()) {
        for (position, line) in wrap(help, columns - 2).iter().enumerate() {
            let label = if position == 0 { paint.cyan("help:") } else { "     ".to_owned() };
            writeln!(out, "  {label} {line}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str, unicode: bool) -> String {
        let mut out = Vec::new();
        report(&mut out, text, Paint(false), unicode).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// What is wrong, what it is about and the way out are told apart; nothing of the text is lost.
    #[test]
    fn reports() {
        let undefined = "2 undefined symbols\n  _Zx (x), needed by a.o\n  y, needed by b.o; c.o\nlink with -l stdc++";
        let expected = "  × 2 undefined symbols\n  ├─ _Zx (x), needed by a.o\n  ╰─ y, needed by b.o; c.o\n  help: link with -l stdc++\n";
        assert_eq!(shown(undefined, true), expected);
        let plain = "cannot run the compiler xx: no; install it, or name another in $CC";
        let expected = "  x cannot run the compiler xx: no\n  help: install it, or name another in $CC\n";
        assert_eq!(shown(plain, false), expected);
        let long = "word ".repeat(60);
        assert!(shown(&long, true).lines().all(|line| line.chars().count() <= WIDTH));
        assert_eq!(shown("", true), "  × \n");
    }

    /// Lines are as long as they may be, and words stay whole.
    #[test]
    fn wrapping() {
        assert_eq!(wrap("aa bb cc ddddddd e", 5), ["aa bb", "cc", "ddddddd", "e"]);
        assert_eq!(wrap("", 5), [""]);
    }
}
