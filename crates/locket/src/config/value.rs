//! Values of settings: from text, checked, and back to text.

use locket_server::keys::KeyDigest;

use super::setting::Kind;

/// Stands for a key wherever one would be shown.
const HIDDEN: &str = "***";

/// A checked value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Of [`Kind::Switch`].
    Switch(bool),
    /// Of [`Kind::Integer`] and [`Kind::Bytes`].
    Integer(u64),
    /// Of [`Kind::Number`].
    Number(f64),
    /// Of [`Kind::Text`] and [`Kind::Choice`].
    Text(String),
    /// Of [`Kind::TextList`] and [`Kind::ChoiceList`].
    TextList(Vec<String>),
    /// Of [`Kind::SecretList`]: only the digests are kept.
    SecretList(Vec<KeyDigest>),
    /// Of [`Kind::IntegerList`].
    IntegerList(Vec<u64>),
}

impl Value {
    /// Reads the texts that a source gave for one setting.
    ///
    /// # Errors
    /// What is wrong and what would be right, without key and source.
    pub fn parse(kind: Kind, parts: &[String]) -> Result<Self, String> {
        let one = || match parts {
            [one] => Ok(one.trim()),
            _ => Err(format!("one value is needed, not {}", parts.len())),
        };
        match kind {
            Kind::Switch => match one()? {
                "true" | "1" => Ok(Self::Switch(true)),
                "false" | "0" => Ok(Self::Switch(false)),
                other => Err(format!("{other:?} is neither true nor false")),
            },
            Kind::Integer { min, max, .. } => integer(one()?, kind, min, max).map(Self::Integer),
            Kind::Number { min, max, .. } => {
                let text = one()?;
                let number = text.parse::<f64>().ok().filter(|number| (min..=max).contains(number));
                number.map(Self::Number).ok_or_else(|| format!("{text:?} is not {}", kind.describe()))
            }
            Kind::Bytes { min } => {
                let text = one()?;
                let bytes = parse_bytes(text)?;
                if bytes < min {
                    return Err(format!("{text:?} is less than {}", format_bytes(min)));
                }
                Ok(Self::Integer(bytes))
            }
            Kind::Choice(words) => {
                let text = one()?;
                if words.contains(&text) {
                    Ok(Self::Text(text.to_owned()))
                } else {
                    Err(format!("{text:?} is not one of {}", words.join(", ")))
                }
            }
            Kind::ChoiceList(words) => {
                let parts: Vec<&str> = parts.iter().map(|part| part.trim()).collect();
                match parts.iter().find(|part| !words.contains(part)) {
                    Some(part) => Err(format!("{part:?} is not one of {}", words.join(", "))),
                    None => Ok(Self::TextList(parts.into_iter().map(str::to_owned).collect())),
                }
            }
            Kind::Text { what } => match one()? {
                "" => Err(format!("it is empty; a {what} is needed")),
                text => Ok(Self::Text(text.to_owned())),
            },
            Kind::TextList { .. } => match parts.iter().find(|part| part.trim().is_empty()) {
                Some(_) => Err("one of its entries is empty".into()),
                None => Ok(Self::TextList(parts.iter().map(|part| part.trim().to_owned()).collect())),
            },
            Kind::SecretList => {
                parts.iter().map(|part| secret(part)).collect::<Result<_, _>>().map(Self::SecretList)
            }
            Kind::IntegerList { min, max, .. } => parts
                .iter()
                .map(|part| integer(part.trim(), kind, min, max))
                .collect::<Result<_, _>>()
                .map(Self::IntegerList),
        }
    }

    /// As it stands in the file, after the `=`.
    pub fn to_toml(&self, kind: Kind) -> String {
        match self {
            Self::Switch(on) => on.to_string(),
            Self::Integer(bytes) if matches!(kind, Kind::Bytes { .. }) => quote(&format_bytes(*bytes)),
            Self::Integer(number) => number.to_string(),
            Self::Number(number) => format!("{number:?}"),
            Self::Text(text) => quote(text),
            Self::TextList(texts) => {
                format!("[{}]", texts.iter().map(|t| quote(t)).collect::<Vec<_>>().join(", "))
            }
            Self::SecretList(digests) => {
                format!("[{}]", digests.iter().map(|_| quote(HIDDEN)).collect::<Vec<_>>().join(", "))
            }
            Self::IntegerList(numbers) => {
                format!("[{}]", numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// The digest of a key; no error quotes it.
fn secret(text: &str) -> Result<KeyDigest, String> {
    let text = text.trim();
    if text == HIDDEN {
        return Err(format!("{HIDDEN} stands for a key that is not shown; it is none itself"));
    }
    let is_good = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    let digest = is_good.then(|| KeyDigest::of(text.as_bytes()));
    digest.ok_or_else(|| "one of its keys is empty, or not of visible ASCII characters".into())
}

fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn integer(text: &str, kind: Kind, min: u64, max: u64) -> Result<u64, String> {
    let number = text.replace('_', "").parse::<u64>().ok().filter(|number| (min..=max).contains(number));
    number.ok_or_else(|| format!("{text:?} is not {}", kind.describe()))
}

/// The entries of a comma-separated list; no text is no entry.
pub fn split_list(text: &str) -> Vec<String> {
    if text.trim().is_empty() {
        return Vec::new();
    }
    text.split(',').map(|part| part.trim().to_owned()).collect()
}

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// Reads `4GiB`, `1.5 GB`, `65536`.
///
/// # Errors
/// Not a number of bytes, or more than 64 bits hold.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let (number, unit) = UNITS
        .iter()
        .find_map(|(name, size)| Some((lower.strip_suffix(&name.to_lowercase())?, *size)))
        .unwrap_or((&lower, 1));
    let number = number.trim().replace('_', "");
    let wrong = || format!("{text:?} is not a number of bytes such as 4GiB, 512MiB or 65536");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(wrong);
    }
    let decimal = number.parse::<f64>().map_err(|_| wrong())?;
    let bytes = decimal * unit as f64;
    if !number.starts_with(|c: char| c.is_ascii_digit()) || unit == 1 || bytes >= u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// Writes bytes exactly: the largest power of 1,024 that divides them, or plain bytes.
pub fn format_bytes(bytes: u64) -> String {
    UNITS
        .iter()
        .filter(|(name, _)| name.contains('i'))
        .find(|(_, size)| bytes >= *size && bytes.is_multiple_of(*size))
        .map_or_else(|| bytes.to_string(), |(name, size)| format!("{}{name}", bytes / size))
}

/// Writes bytes for reading, three digits: `1.23 GiB`, `512 MiB`, `17 B`.
pub fn about_bytes(bytes: u64) -> String {
    let (name, size) = UNITS
        .iter()
        .filter(|(name, _)| name.contains('i'))
        .find(|(_, size)| bytes >= *size)
        .unwrap_or(&("B", 1));
    let number = bytes as f64 / *size as f64;
    let digits = if *size == 1 || number >= 100.0 {
        0
    } else if number >= 10.0 {
        1
    } else {
        2
    };
    format!("{number:.digits$} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("4GiB"), Ok(4 << 30));
        assert_eq!(parse_bytes(" 512 mib"), Ok(512 << 20));
        assert_eq!(parse_bytes("1.5GB"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("65_536"), Ok(65_536));
        assert_eq!(parse_bytes("10B"), Ok(10));
        for wrong in
            ["", "GiB", "-1", "-1GiB", "1.5", "nanGiB", "infMiB", "1e30GiB", "99999999999GiB", "4 quids"]
        {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!(format_bytes(4 << 20), "4MiB");
        assert_eq!(format_bytes(1500), "1500");
        for bytes in [0, 1, 1 << 10, 3 << 30, 1_234_567] {
            assert_eq!(parse_bytes(&format_bytes(bytes)), Ok(bytes));
        }
        assert_eq!(about_bytes(17), "17 B");
        assert_eq!(about_bytes(1_234_567_890), "1.15 GiB");
        assert_eq!(about_bytes(191_692_800), "183 MiB");
    }

    #[test]
    fn keys_are_never_shown() {
        let parse = |key: &str| Value::parse(Kind::SecretList, &[key.to_owned()]);
        let value = parse("sk-secret").unwrap();
        assert_eq!(value.to_toml(Kind::SecretList), "[\"***\"]");
        assert!(!format!("{value:?}").contains("secret"));
        for wrong in ["", " ", "sk secret", "sk-sécret", "***"] {
            assert!(!parse(wrong).unwrap_err().contains("secret"), "{wrong}");
        }
    }

    #[test]
    fn ranges_are_named_in_the_error() {
        let kind = Kind::Integer { min: 1, max: 9, unit: "rows" };
        assert_eq!(Value::parse(kind, &["9".into()]), Ok(Value::Integer(9)));
        for wrong in ["0", "10", "x", "", "1.0", "-1"] {
            let error = Value::parse(kind, &[wrong.into()]).unwrap_err();
            assert!(error.contains("1 to 9 rows"), "{error}");
        }
        assert!(Value::parse(kind, &["1".into(), "2".into()]).is_err());
        let seconds = Kind::Number { min: 0.0, max: 5.0, unit: "s" };
        assert!(Value::parse(seconds, &["nan".into()]).is_err());
        assert!(Value::parse(seconds, &["inf".into()]).is_err());
    }
}
