//! The key file: TOML with one `[[key]]` per key.
//!
//! It is read by hand and not into types, because the errors of those quote values, and a value may
//! be a key.

use std::{io::Read as _, path::Path};

use toml::{Table, Value, value::Datetime};

use super::{KeyDigest, KeyEntry, KeysError, LimitSettings};

/// A longer file is none of keys.
const MAX_BYTES: u64 = 1 << 20;
/// Each name is a label of metrics.
const MAX_KEYS: usize = 4096;
const MAX_NAME: usize = 64;
const MAX_KEY: usize = 512;
const FIELDS: &str = "name, key, sha256, requests-per-minute, tokens-per-minute, max-concurrent, \
                      may-prioritise, models, expires";

/// Reads a key file, which must hold at least one key.
///
/// # Errors
/// No file, no TOML, an entry that is wrong, or no entry at all. No error holds a key.
pub fn read_file(path: &Path) -> Result<Vec<KeyEntry>, KeysError> {
    let shown = path.display().to_string();
    let text = read_text(path)
        .map_err(|error| KeysError::Unreadable { path: shown.clone(), reason: error.to_string() })?;
    let parsed = parse(&text);
    let KeyFile { entries, has_clear_keys } =
        parsed.map_err(|(place, reason)| KeysError::Invalid { path: shown.clone(), place, reason })?;
    if has_clear_keys && is_readable_by_others(path) {
        tracing::warn!(
            file = shown,
            "the key file holds keys in clear and others than its owner may read it"
        );
    }
    Ok(entries)
}

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
struct KeyFile {
    entries: Vec<KeyEntry>,
    /// Some key stands there itself, not its digest.
    has_clear_keys: bool,
}

fn read_text(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(std::io::Error::other(format!("longer than {MAX_BYTES} bytes")));
    }
    Ok(text)
}

#[cfg(unix)]
fn is_readable_by_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
fn is_readable_by_others(_: &Path) -> bool {
    false
}

/// Place and reason of what is wrong.
type Wrong = (String, String);

fn parse(text: &str) -> Result<KeyFile, Wrong> {
    let file = |reason: String| ("the whole file".to_owned(), reason);
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
        (format!("line {line}"), "not valid TOML".to_owned())
    })?;
    if let Some(name) = table.keys().find(|name| *name != "key") {
        return Err(file(format!("{}; each key is a table [[key]]", unknown(name))));
    }
    let entries = match table.get("key") {
        Some(Value::Array(entries)) if !entries.is_empty() => entries,
        _ => return Err(file("there is no key; each is a table [[key]]".into())),
    };
    if entries.len() > MAX_KEYS {
        return Err(file(format!("{} keys are more than {MAX_KEYS}", entries.len())));
    }
    let entries = (1..).zip(entries).map(|(number, entry)| read_entry(number, entry));
    let entries = entries.collect::<Result<Vec<_>, _>>()?;
    let has_clear_keys = entries.iter().any(|(_, is_clear)| *is_clear);
    Ok(KeyFile { entries: entries.into_iter().map(|(entry, _)| entry).collect(), has_clear_keys })
}

/// Says that a name is unknown, and which one, unless it may be a key at the wrong place.
fn unknown(name: &str) -> String {
    let is_harmless = name.len() <= 24
        && !name.starts_with("sk-")
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if is_harmless { format!("{name:?} is unknown") } else { "a name is unknown".to_owned() }
}

/// An entry, and whether it holds the key itself.
fn read_entry(number: usize, entry: &Value) -> Result<(KeyEntry, bool), Wrong> {
    let table = entry.as_table();
    let name = table.and_then(|table| table.get("name")?.as_str()).filter(|name| is_name(name));
    let place = match name {
        Some(name) => format!("key {number} ({name})"),
        None => format!("key {number}"),
    };
    let read = || {
        let table = table.ok_or("it must be a table [[key]]")?;
        let name = name.ok_or("`name` must be 1 to 64 of A-Z, a-z, 0-9 and . _ - @")?;
        read_fields(name, table)
    };
    read().map_err(|reason: String| (place, reason))
}

fn is_name(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_good)
}

fn read_fields(name: &str, table: &Table) -> Result<(KeyEntry, bool), String> {
    let (mut key, mut sha256) = (None, None);
    let mut entry = KeyEntry::unlimited(name, KeyDigest::of(b""));
    let limits: &mut LimitSettings = &mut entry.limits;
    for (field, value) in table {
        match field.as_str() {
            "name" => {}
            "key" => key = Some(read_key(value)?),
            "sha256" => sha256 = Some(read_digest(value)?),
            "requests-per-minute" => limits.requests_per_minute = Some(read_limit(field, value)?),
            "tokens-per-minute" => limits.tokens_per_minute = Some(read_limit(field, value)?),
            "max-concurrent" => limits.max_concurrent = Some(read_limit(field, value)?),
            "may-prioritise" => {
                entry.may_prioritise = value.as_bool().ok_or("`may-prioritise` must be true or false")?;
            }
            "models" => entry.models = read_models(value)?,
            "expires" => entry.expires = Some(read_time(value)?),
            _ => return Err(format!("{}; there are {FIELDS}", unknown(field))),
        }
    }
    let is_clear = key.is_some();
    entry.digest = match (key, sha256) {
        (Some(digest), None) | (None, Some(digest)) => digest,
        _ => return Err("it needs either `key` or `sha256`, which `locket keys hash` makes".into()),
    };
    Ok((entry, is_clear))
}

fn read_key(value: &Value) -> Result<KeyDigest, String> {
    let key = value.as_str().filter(|key| is_key(key));
    let key = key.ok_or_else(|| format!("`key` must be 1 to {MAX_KEY} visible ASCII characters"))?;
    Ok(KeyDigest::of(key.as_bytes()))
}

/// Whether clients can send it in a header.
pub(super) fn is_key(key: &str) -> bool {
    (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic())
}

fn read_digest(value: &Value) -> Result<KeyDigest, String> {
    let digest = value.as_str().and_then(KeyDigest::from_hex);
    digest.ok_or_else(|| "`sha256` must be 64 hexadecimal digits".into())
}

fn read_limit(field: &str, value: &Value) -> Result<u32, String> {
    let limit = value.as_integer().and_then(|limit| u32::try_from(limit).ok()).filter(|limit| *limit > 0);
    limit.ok_or_else(|| format!("`{field}` must be a whole number from 1 to {}", u32::MAX))
}

fn read_models(value: &Value) -> Result<Vec<String>, String> {
    let names = value.as_array().filter(|names| !names.is_empty());
    let names = names.and_then(|names| names.iter().map(|name| name.as_str().map(str::to_owned)).collect());
    names.ok_or_else(|| "`models` must be a list of served names; without it all are allowed".into())
}

fn read_time(value: &Value) -> Result<u64, String> {
    let time = value.as_datetime().and_then(unix_time);
    time.ok_or_else(|| {
        "`expires` must be a date or a time, such as 2027-01-31 or 2027-01-31T12:00:00Z".into()
    })
}

/// Unix seconds; without a time of the day its start, without an offset UTC.
fn unix_time(value: &Datetime) -> Option<u64> {
    let date = value.date?;
    let days = days_from_epoch(i64::from(date.year), i64::from(date.month), i64::from(date.day));
    let seconds = value
        .time
        .map_or(0, |time| i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + i64::from(time.second));
    let offset = match value.offset {
        Some(toml::value::Offset::Custom { minutes }) => i64::from(minutes) * 60,
        Some(toml::value::Offset::Z) | None => 0,
    };
    u64::try_from(days * 86_400 + seconds - offset).ok()
}

/// Days from 1970-01-01 in the Gregorian calendar: years begin in March, so that the leap day is last.
fn days_from_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_whole_entry() {
        let hex = KeyDigest::of(b"other").to_hex();
        let text = format!(
            "[[key]]\nname = \"alice@example.org\"\nkey = \"sk-alice\"\nrequests-per-minute = 60\n\
             tokens-per-minute = 100_000\nmax-concurrent = 4\nmay-prioritise = true\nmodels = [\"a\", \"org/b\"]\n\
             expires = 2027-01-01T01:00:00+01:00\n[[key]]\nname = \"b\"\nsha256 = \"{hex}\"\n"
        );
        let KeyFile { entries, has_clear_keys } = parse(&text).expect("two keys");
        assert!(has_clear_keys);
        let limits = LimitSettings {
            requests_per_minute: Some(60),
            tokens_per_minute: Some(100_000),
            max_concurrent: Some(4),
        };
        let alice = KeyEntry {
            name: "alice@example.org".into(),
            digest: KeyDigest::of(b"sk-alice"),
            limits,
            may_prioritise: true,
            models: vec!["a".into(), "org/b".into()],
            expires: Some(1_798_761_600),
        };
        assert_eq!(entries, [alice, KeyEntry::unlimited("b", KeyDigest::of(b"other"))]);
    }

    /// What is wrong is named with its place, and never quotes a value.
    #[test]
    fn wrong_files() {
        let entry = |fields: &str| format!("[[key]]\nname = \"ann\"\n{fields}\n");
        let rows = [
            (String::new(), "there is no key"),
            ("key = \"sk-secret\"".into(), "there is no key"),
            ("keys = 1".into(), "\"keys\" is unknown"),
            ("[[key]]\nname = \"a\"\nkey = \"sk-secret".into(), "line 3"),
            ("[[key]]\nkey = \"sk-secret\"".into(), "key 1: `name`"),
            ("[[key]]\nname = \"sk secret\"\nkey = \"k\"".into(), "`name`"),
            (entry(""), "key 1 (ann): it needs either"),
            (entry("key = \"sk-secret\"\nsha256 = \"00\""), "64 hexadecimal"),
            (entry(&format!("key = \"sk-secret\"\nsha256 = \"{}\"", "0".repeat(64))), "either"),
            (entry("key = \"sk secret\""), "visible ASCII"),
            (entry("key = \"\""), "visible ASCII"),
            (entry("key = [\"sk-secret\"]"), "visible ASCII"),
            (entry("requests-per-minute = \"sk-secret\""), "`requests-per-minute`"),
            (entry("tokens-per-minute = 0"), "`tokens-per-minute`"),
            (entry("max-concurrent = -1"), "`max-concurrent`"),
            (entry("models = []"), "`models`"),
            (entry("models = [1]"), "`models`"),
            (entry("may-prioritise = 1"), "`may-prioritise`"),
            (entry("expires = \"sk-secret\""), "`expires`"),
            (entry("expires = 12:00:00"), "`expires`"),
            (entry("request-per-minute = 1"), "\"request-per-minute\" is unknown"),
            (entry("sk-secret = \"ann\""), "a name is unknown; there are name, key"),
            (entry("secretsecretsecretsecretse = 1"), "a name is unknown"),
            (entry("Secret = 1").replace("Secret", "seCret"), "a name is unknown"),
            ("\"sk-secret\" = \"ann\"".into(), "a name is unknown; each key"),
        ];
        for (text, wanted) in rows {
            let (place, reason) = parse(&text).expect_err("must fail");
            let message = format!("{place}: {reason}");
            assert!(message.contains(wanted), "{text}: {message}");
            assert!(!message.to_lowercase().contains("secret"), "{message}");
        }
    }

    #[test]
    fn keys_in_clear_are_noticed_however_they_are_written() {
        let hex = KeyDigest::of(b"k").to_hex();
        let rows = [
            ("key=\"k\"".to_owned(), true),
            ("key  =  \"k\"".into(), true),
            ("\"key\" = 'k'".into(), true),
            (format!("sha256 = \"{hex}\" # key = none"), false),
        ];
        for (field, is_clear) in rows {
            let file = parse(&format!("[[key]]\nname = \"a\"\n{field}\n")).expect("a key");
            assert_eq!(file.has_clear_keys, is_clear, "{field}");
        }
    }

    #[test]
    fn dates() {
        let days =
            [((1970, 1, 1), 0), ((2000, 3, 1), 11_017), ((2024, 2, 29), 19_782), ((2027, 1, 1), 20_819)];
        for ((year, month, day), wanted) in days {
            assert_eq!(days_from_epoch(year, month, day), wanted);
        }
    }

    proptest! {
        /// Any text is a list of keys or an error.
        #[test]
        fn no_text_panics(text in "(?s)(\\[\\[key\\]\\]\n|name = \"a\"\n|key = .{0,9}\n|expires = .{0,9}\n|.){0,8}") {
            let _ = parse(&text);
        }
    }
}
