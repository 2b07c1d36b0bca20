//! GNU ld scripts in place of shared libraries, as `libm.so` and `libc.so` are on many systems.
//!
//! Only what such stand-ins use is read: `INPUT` and `GROUP` with file names, `AS_NEEDED` within them, and comments.
//! Files that are only as needed are left out: what is needed is decided when a symbol is looked up, and the library
//! that needs them opens them itself.

/// Returns the files that a script names, in order.
pub(crate) fn parse(text: &str) -> Result<Vec<String>, String> {
    let text = without_comments(text)?;
    let spaced = text.replace('(', " ( ").replace(')', " ) ").replace(',', " ");
    let mut words = spaced.split_whitespace();
    let mut files = Vec::new();
    while let Some(command) = words.next() {
        if words.next() != Some("(") {
            return Err(format!("it is neither an ELF file nor a linker script ({command:?} is no command)"));
        }
        match command {
            "INPUT" | "GROUP" => arguments(&mut words, &mut files)?,
            "OUTPUT_FORMAT" | "OUTPUT_ARCH" => arguments(&mut words, &mut Vec::new())?,
            other => return Err(format!("a linker script with the command {other} is not understood")),
        }
    }
    Ok(files)
}

/// Reads file names up to the closing parenthesis.
fn arguments<'a>(words: &mut impl Iterator<Item = &'a str>, files: &mut Vec<String>) -> Result<(), String> {
    let mut as_needed = false;
    while let Some(word) = words.next() {
        match word {
            "AS_NEEDED" if words.next() == Some("(") && !as_needed => as_needed = true,
            ")" if as_needed => as_needed = false,
            ")" => return Ok(()),
            "(" | "AS_NEEDED" => break,
            _ if as_needed => {}
            file => files.push(file.to_owned()),
        }
    }
    Err("the linker script has unbalanced parentheses".to_owned())
}

fn without_comments(text: &str) -> Result<String, String> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("/*") {
        result.push_str(before);
        result.push(' ');
        rest = comment.split_once("*/").ok_or("the linker script has a comment without an end")?.1;
    }
    result.push_str(rest);
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scripts that Debian has for libm and libc name the shared library, and what is only as needed is left out.
    #[test]
    fn reads_stand_ins() {
        let libm = "/* GNU ld script\n*/\nOUTPUT_FORMAT(elf64-x86-64)\n\
                    GROUP ( /lib/x86_64-linux-gnu/libm.so.6  AS_NEEDED ( /lib/x86_64-linux-gnu/libmvec.so.1 ) )\n";
        assert_eq!(parse(libm), Ok(vec!["/lib/x86_64-linux-gnu/libm.so.6".to_owned()]));
        assert_eq!(parse("INPUT(a.so,b.a -lc)"), Ok(["a.so", "b.a", "-lc"].map(str::to_owned).to_vec()));
    }

    /// Text that is no such script is an error that says so.
    #[test]
    fn refuses_other_text() {
        for bad in ["hello", "GROUP", "GROUP ( a", "SECTIONS ( )", "GROUP ( a AS_NEEDED b )", "/* x", "INPUT ( ( ) )"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
