//! GNU ld scripts in place of shared libraries, as `libm.so` and `libc.so` are on many systems.
//!
//! Only what such stand-ins use is read: `INPUT` and `GROUP` with file names, `AS_NEEDED` within them, and comments.

/// The files that a script names, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) inputs: Vec<String>,
    /// Those that are for what the others do not define.
    pub(crate) as_needed: Vec<String>,
}

/// Returns the files that a script names.
pub(crate) fn parse(text: &str) -> Result<Files, String> {
    let text = without_comments(text)?;
    let spaced = text.replace('(', " ( ").replace(')', " ) ").replace(',', " ");
    let mut words = spaced.split_whitespace();
    let mut files = Files::default();
    while let Some(command) = words.next() {
        if words.next() != Some("(") {
            return Err(format!("it is neither an ELF file nor a linker script ({command:?} is no command)"));
        }
        match command {
            "INPUT" | "GROUP" => arguments(&mut words, &mut files)?,
            "OUTPUT_FORMAT" | "OUTPUT_ARCH" => arguments(&mut words, &mut Files::default())?,
            other => return Err(format!("a linker script with the command {other} is not understood")),
        }
    }
    Ok(files)
}

/// Reads file names up to the closing parenthesis.
fn arguments<'a>(words: &mut impl Iterator<Item = &'a str>, files: &mut Files) -> Result<(), String> {
    let mut as_needed = false;
    while let Some(word) = words.next() {
        match word {
            "AS_NEEDED" if words.next() == Some("(") && !as_needed => as_needed = true,
            ")" if as_needed => as_needed = false,
            ")" => return Ok(()),
            "(" | "AS_NEEDED" => break,
            file if as_needed => files.as_needed.push(file.to_owned()),
            file => files.inputs.push(file.to_owned()),
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

    /// The scripts that Debian has for libm and libc name the shared library, and what is only as needed is kept apart.
    #[test]
    fn reads_stand_ins() {
        let libm = "/* GNU ld script\n*/\nOUTPUT_FORMAT(elf64-x86-64)\n\
                    GROUP ( /lib/x86_64-linux-gnu/libm.so.6  AS_NEEDED ( /lib/x86_64-linux-gnu/libmvec.so.1 ) )\n";
        let files = parse(libm).unwrap();
        assert_eq!(files.inputs, ["/lib/x86_64-linux-gnu/libm.so.6"]);
        assert_eq!(files.as_needed, ["/lib/x86_64-linux-gnu/libmvec.so.1"]);
        assert_eq!(parse("INPUT(a.so,b.a -lc)").unwrap().inputs, ["a.so", "b.a", "-lc"]);
    }

    /// Text that is no such script is an error that says so.
    #[test]
    fn refuses_other_text() {
        for bad in ["hello", "GROUP", "GROUP ( a", "SECTIONS ( )", "GROUP ( a AS_NEEDED b )", "/* x", "INPUT ( ( ) )"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
