//! llama.cpp's EBNF (GBNF) to Lark.
//!
//! | GBNF | Lark |
//! | --- | --- |
//! | `root ::= item+` | `start: item+` |
//! | `my-rule` | `rule_my_mrule` |
//! | `[a-z]`, `[^"]` | `/[a-z]/`, `/[^"]/` |
//! | `.` | `/(?s:.)/` |
//! | `# comment` | left out |

use super::GrammarError;

/// Translates a grammar.
///
/// # Errors
/// A character class or literal without an end, a rule without a name, or no rule `root`.
pub(super) fn to_lark(text: &str) -> Result<String, GrammarError> {
    let mut lark = String::with_capacity(text.len() + text.len() / 2);
    let mut has_root = false;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' => {
                let length = literal_end(rest, '"')?;
                lark.push_str(&rest[..length]);
                length
            }
            '[' => {
                let length = literal_end(rest, ']')?;
                lark.push_str(&format!("/{}/", rest[..length].replace('/', "\\/")));
                length
            }
            '.' => {
                lark.push_str("/(?s:.)/");
                1
            }
            '{' => {
                let length = rest.find('}').map_or(rest.len(), |end| end + 1);
                lark.push_str(&rest[..length]);
                length
            }
            _ if is_name(first) => {
                let length = rest.find(|letter| !is_name(letter)).unwrap_or(rest.len());
                let name = &rest[..length];
                let after = rest[length..].trim_start();
                if after.starts_with("::=") {
                    // A rule begins on a line of its own.
                    lark.truncate(lark.trim_end().len());
                    lark.push('\n');
                    has_root |= name == "root";
                }
                lark.push_str(&rule_name(name));
                length
            }
            ':' if rest.starts_with("::=") => {
                lark.push(':');
                3
            }
            // A new line inside a rule says nothing in GBNF, but would end it in Lark.
            '\n' | '\r' => {
                lark.push(' ');
                1
            }
            other => {
                lark.push(other);
                other.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    if !has_root {
        return Err(GrammarError::whole("an EBNF grammar must have a rule `root ::= …`"));
    }
    Ok(lark)
}

fn is_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '-' || letter == '_'
}

/// Rules of Lark are lower case; the prefix keeps `start` and names that begin with a digit apart.
fn rule_name(name: &str) -> String {
    if name == "root" {
        return "start".into();
    }
    let mut lark = String::from("rule_");
    for letter in name.chars() {
        match letter {
            // Two names are never one in Lark: `_` begins two letters that stand for one.
            '_' => lark.push_str("__"),
            '-' => lark.push_str("_m"),
            'A'..='Z' => {
                lark.push_str("_u");
                lark.push(letter.to_ascii_lowercase());
            }
            _ => lark.push(letter),
        }
    }
    lark
}

/// Length of the literal or class that `text` begins with, its end included.
fn literal_end(text: &str, end: char) -> Result<usize, GrammarError> {
    let mut is_escaped = false;
    for (at, letter) in text.char_indices().skip(1) {
        match letter {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            _ if letter == end => return Ok(at + letter.len_utf8()),
            _ => {}
        }
    }
    let line = text.lines().next().unwrap_or_default();
    let shown: String = line.chars().take(40).collect();
    Err(GrammarError::whole(format!("`{shown}` has no closing `{end}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_apart() {
        let names = [
            "root", "start", "A", "a_u", "a", "ua", "_ua", "u-a", "a-b", "a__b", "a_b", "a_mb", "aB", "AB",
            "1",
        ];
        let mut lark: Vec<String> = names.into_iter().map(rule_name).collect();
        lark.sort();
        lark.dedup();
        assert_eq!(lark.len(), names.len(), "{lark:?}");
        let is_rule =
            |name: &String| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        assert!(lark.iter().all(is_rule), "{lark:?}");
    }
}
