//! Text to tokens.

/// A token, and where it begins.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    Number(f64),
    Name(String),
    /// `fn`, `let`, `if`, `else`, `while`, `return`, operators and punctuation.
    Fixed(&'static str),
}

const KEYWORDS: [&str; 6] = ["fn", "let", "if", "else", "while", "return"];

/// Longer ones first.
const SIGNS: [&str; 18] =
    ["==", "!=", "<=", ">=", "<", ">", "=", "+", "-", "*", "/", "%", "(", ")", "{", "}", ",", ";"];

/// Returns the tokens of a text, each with the number of its line. `#` begins a comment.
pub(crate) fn tokens(text: &str) -> Result<Vec<(Token, usize)>, String> {
    let mut tokens = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        let mut rest = line.split('#').next().unwrap_or_default().trim_start();
        while let Some(first) = rest.chars().next() {
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
            let length = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            let (token, length) = if first.is_ascii_digit() {
                let value =
                    rest[..length].parse().map_err(|_| format!("line {number}: {} is no number", &rest[..length]))?;
                (Token::Number(value), length)
            } else if is_word(first) {
                let word = &rest[..length];
                let keyword = KEYWORDS.into_iter().find(|&keyword| keyword == word);
                (keyword.map_or_else(|| Token::Name(word.to_owned()), Token::Fixed), length)
            } else {
                let sign = SIGNS.into_iter().find(|sign| rest.starts_with(sign));
                let sign = sign.ok_or_else(|| format!("line {number}: {first:?} means nothing"))?;
                (Token::Fixed(sign), sign.len())
            };
            tokens.push((token, number));
            rest = rest[length..].trim_start();
        }
    }
    Ok(tokens)
}
