//! Typed access to the merged table.

use locket_server::keys::KeyDigest;

use super::{Entry, value::Value};

/// Typed access to the merged table. The table decides the type of every value, and a test reads
/// all of them, so a mismatch is a bug of this file alone.
pub(super) struct Reader<'e> {
    pub(super) entries: &'e [Entry],
}

impl Reader<'_> {
    fn value(&self, key: &str) -> Option<&Value> {
        let entry = self.entries.iter().find(|entry| entry.setting.key == key);
        entry.expect("the key is in the table").value.as_ref()
    }

    pub(super) fn integer_if_set(&self, key: &str) -> Option<u64> {
        self.value(key).map(|value| match value {
            Value::Integer(number) => *number,
            other => unreachable!("{key} is an integer, not {other:?}"),
        })
    }

    pub(super) fn integer(&self, key: &str) -> u64 {
        self.integer_if_set(key).expect("has a default")
    }

    pub(super) fn number_if_set(&self, key: &str) -> Option<f64> {
        self.value(key).map(|value| match value {
            Value::Number(number) => *number,
            other => unreachable!("{key} is a number, not {other:?}"),
        })
    }

    pub(super) fn number(&self, key: &str) -> f64 {
        self.number_if_set(key).expect("has a default")
    }

    pub(super) fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Some(Value::Switch(true)))
    }

    pub(super) fn text_if_set(&self, key: &str) -> Option<String> {
        self.value(key).map(|value| match value {
            Value::Text(text) => text.clone(),
            other => unreachable!("{key} is a text, not {other:?}"),
        })
    }

    pub(super) fn text(&self, key: &str) -> String {
        self.text_if_set(key).expect("has a default")
    }

    pub(super) fn texts_if_set(&self, key: &str) -> Option<Vec<String>> {
        self.value(key).map(|value| match value {
            Value::TextList(texts) => texts.clone(),
            other => unreachable!("{key} is a list of texts, not {other:?}"),
        })
    }

    pub(super) fn texts(&self, key: &str) -> Vec<String> {
        self.texts_if_set(key).unwrap_or_default()
    }

    pub(super) fn secrets(&self, key: &str) -> Vec<KeyDigest> {
        match self.value(key) {
            Some(Value::SecretList(digests)) => digests.clone(),
            _ => Vec::new(),
        }
    }

    pub(super) fn integers(&self, key: &str) -> Vec<u32> {
        match self.value(key) {
            Some(Value::IntegerList(numbers)) => numbers.iter().map(|&number| number as u32).collect(),
            _ => Vec::new(),
        }
    }
}
