//! Names as people write them, for messages.

use cpp_demangle::DemangleOptions;
use std::fmt::Write;

/// Longest name that is demangled, and longest that comes of it, in bytes.
const MAX_BYTES: usize = 4096;

/// Returns `name`, with the name in its language behind it if it is one of C++ or Rust: `_Z3addii (add(int, int))`.
#[must_use]
pub fn with_demangled(name: &str) -> String {
    match demangled(name) {
        Some(text) => format!("{name} ({text})"),
        None => name.to_owned(),
    }
}

/// Returns the name in its language, if `name` is one of C++ or Rust: `add(int, int)` for `_Z3addii`.
#[must_use]
pub fn demangled(name: &str) -> Option<String> {
    if name.len() > MAX_BYTES {
        return None;
    }
    let mut text = Bounded(String::new());
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        // Without the hash at its end.
        write!(text, "{rust:#}").ok()?;
    } else if name.starts_with("_Z") {
        let symbol = cpp_demangle::Symbol::new(name).ok()?;
        symbol.structured_demangle(&mut text, &DemangleOptions::default()).ok()?;
    }
    Some(text.0).filter(|text| !text.is_empty())
}

/// A text that does not grow without end: a short name can stand for one that does.
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.0.len() + text.len() > MAX_BYTES {
            return Err(std::fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names of C++ and of Rust, in both of its schemes, are shown as they are written; others are as they are.
    #[test]
    fn names() {
        assert_eq!(with_demangled("_Z3addii"), "_Z3addii (add(int, int))");
        assert_eq!(with_demangled("_RNvC3foo3bar"), "_RNvC3foo3bar (foo::bar)");
        let old = "_ZN4core3fmt5Write9write_fmt17h0123456789abcdefE";
        assert_eq!(with_demangled(old), format!("{old} (core::fmt::Write::write_fmt)"));
        for name in ["main", "_Z", "_Zxx", "_R", ""] {
            assert_eq!(with_demangled(name), name);
        }
        let endless = format!("_Z{}", "1a".repeat(MAX_BYTES));
        assert_eq!(with_demangled(&endless), endless);
    }
}
