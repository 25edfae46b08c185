//! Grammars as their authors write them: Lark as it is, llama.cpp's EBNF translated.

use super::{GrammarError, limits};

/// The text of a Lark grammar.
///
/// # Errors
/// Too long, nested too deeply, or an EBNF that cannot be translated.
pub(super) fn prepare(text: &str) -> Result<String, GrammarError> {
    if text.len() > limits::MAX_LARK_BYTES {
        let reason = format!("it has {} bytes, but may have at most {}", text.len(), limits::MAX_LARK_BYTES);
        return Err(GrammarError::whole(reason));
    }
    check_brackets(text)?;
    if text.contains("::=") { super::gbnf::to_lark(text) } else { Ok(text.to_owned()) }
}

/// Refuses a text with brackets nested too deeply for compilers that recurse. Brackets in literals
/// count too.
///
/// # Errors
/// One that names the limit.
pub(super) fn check_brackets(text: &str) -> Result<(), GrammarError> {
    let mut depth = 0_usize;
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limits::MAX_BRACKET_DEPTH {
            let reason = format!("its brackets are nested deeper than {}", limits::MAX_BRACKET_DEPTH);
            return Err(GrammarError::whole(reason));
        }
    }
    Ok(())
}
