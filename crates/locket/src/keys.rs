//! `locket keys`: new API keys, and entries of key files for them.

use std::io::Read as _;

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use locket_server::keys::KeyDigest;
use rand::{Rng as _, TryRngCore as _, rngs::OsRng};

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a new key, and print it with an entry for the key file. It is shown this once.
    New(NamedKey),
    /// Read a key from standard input, and print an entry for the key file, which holds its hash only.
    Hash(NamedKey),
}

#[derive(Debug, Args)]
pub struct NamedKey {
    /// The key's name in logs and metrics.
    #[arg(default_value = "unnamed")]
    name: String,
}

/// Does what the command says; returns what is to be printed.
///
/// # Errors
/// A name that no key file may hold, or no key on standard input.
pub fn run(command: KeysCommand) -> anyhow::Result<String> {
    match command {
        KeysCommand::New(NamedKey { name }) => {
            check_name(&name)?;
            let key = new_key();
            Ok(format!("# The key, shown this once: {key}\n{}", entry(&name, &key)))
        }
        KeysCommand::Hash(NamedKey { name }) => {
            /// Longer than any key.
            const MAX_BYTES: u64 = 4096;
            check_name(&name)?;
            let mut text = String::new();
            let read = std::io::stdin().take(MAX_BYTES).read_to_string(&mut text);
            read.context("cannot read the key from standard input")?;
            let key = text.trim();
            let is_key = (1..=512).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
            ensure!(is_key, "a key must be 1 to 512 visible ASCII characters");
            Ok(entry(&name, key))
        }
    }
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
    let is_name = (1..=64).contains(&name.len()) && name.bytes().all(is_good);
    ensure!(is_name, "a name must be 1 to 64 of A-Z, a-z, 0-9 and . _ - @");
    Ok(())
}

/// 43 characters of 62: 256 bits that nobody guesses.
fn new_key() -> String {
    let letters = OsRng.unwrap_err().sample_iter(rand::distr::Alphanumeric).take(43).map(char::from);
    format!("sk-{}", letters.collect::<String>())
}

fn entry(name: &str, key: &str) -> String {
    format!("[[key]]\nname = \"{name}\"\nsha256 = \"{}\"\n", KeyDigest::of(key.as_bytes()).to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is printed for a new key is a key file that admits it.
    #[test]
    fn new_keys_are_entries_of_key_files() {
        let named = |name: &str| NamedKey { name: name.into() };
        let text = run(KeysCommand::New(named("ann"))).unwrap();
        let key = text.lines().next().unwrap().rsplit(' ').next().unwrap().to_owned();
        assert!(key.starts_with("sk-") && key.len() == 46, "{key}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        let entries = locket_server::keys::read_file(file.path()).unwrap();
        assert_eq!((entries[0].name.as_str(), &entries[0].digest), ("ann", &KeyDigest::of(key.as_bytes())));
        assert_ne!(new_key(), new_key());
        assert!(run(KeysCommand::New(named("a\"b"))).is_err());
    }
}
