//! The configuration in writing: the commented file, the reference page, the effective values.

use std::fmt::Write as _;

use super::{
    Entry,
    setting::{Group, Preset, Setting},
    table::SETTINGS,
};

/// Headings in the table's order with their settings.
fn groups() -> Vec<(Group, Vec<&'static Setting>)> {
    let mut groups: Vec<(Group, Vec<&'static Setting>)> = Vec::new();
    for setting in SETTINGS {
        match groups.last_mut() {
            Some((group, settings)) if *group == setting.group => settings.push(setting),
            _ => groups.push((setting.group, vec![setting])),
        }
    }
    groups
}

/// Breaks `text` into lines of at most 96 columns that begin with `# `.
fn comment(text: &str) -> String {
    let mut lines = String::new();
    let mut line = String::from("#");
    for word in text.split(' ') {
        if line.chars().count() + 1 + word.chars().count() > 96 {
            lines.push_str(&line);
            lines.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    lines + &line + "\n"
}

/// `config/locket.toml`: every setting, commented out, with default, unit and reason.
pub fn template_file() -> String {
    let mut text = String::from(
        "# locket's settings. Everything here is the default, commented out; change what you need.\n\
         # The same names work as environment variables (LOCKET_CACHE_SLOTS) and flags (--cache-slots);\n\
         # flags win over the environment, the environment wins over this file.\n\
         # This file is written by `locket config --template`; a test keeps it true.\n",
    );
    for (group, settings) in groups() {
        let _ = write!(text, "\n# ── {} ──\n", group.title());
        if let Some(section) = settings.iter().map(|setting| setting.section()).find(|name| !name.is_empty())
        {
            let _ = writeln!(text, "[{section}]");
        }
        for setting in settings {
            let _ = write!(text, "\n{}", comment(setting.help));
            let range = setting.kind.describe();
            match (setting.preset, setting.default_value()) {
                (Preset::Derived(what), _) => {
                    let _ = write!(text, "{}", comment(&format!("({range}; when unset: {what})")));
                    let _ = writeln!(text, "# {} =", setting.name());
                }
                (Preset::Value(_), Some(value)) => {
                    let _ = write!(text, "{}", comment(&format!("({range})")));
                    let _ = writeln!(text, "# {} = {}", setting.name(), value.to_toml(setting.kind));
                }
                (Preset::Value(_), None) => unreachable!("a preset value is a value"),
            }
        }
    }
    text
}

/// `docs/configuration.md`.
pub fn reference_page() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         <!-- Written by `locket config --reference`; a test keeps it true. -->\n\n\
         Every setting has one name, in three spellings. `slots` in section `[cache]` of the file is\n\
         `LOCKET_CACHE_SLOTS` in the environment and `--cache-slots` on the command line. What counts is the\n\
         flag, else the environment variable, else the file, else the default. The file is the one named by\n\
         `--config`, else by `LOCKET_CONFIG`, else `locket.toml` in the working folder if there is one; it is\n\
         TOML, and [config/locket.toml](../config/locket.toml) is a commented copy to start from.\n\n\
         A name that does not exist is an error, with a suggestion; so is a value out of its range, with the\n\
         key and the line, variable or flag that it came from. `locket config` prints the effective values and\n\
         where each came from. Bytes may be written `4GiB`, `512MiB` (powers of 1,024), `4GB` (powers of\n\
         1,000) or as a plain number. Lists are comma-separated in the environment and in flags.\n\n\
         Not settings: `LOCKET_CONFIG`, `LOCKET_TEST_*`, and the addresses that Kubernetes adds for a service\n\
         called `locket` (`LOCKET_SERVICE_*`, `LOCKET_PORT_*`, a `LOCKET_PORT` that holds a URL): they are\n\
         ignored. The Hugging Face variables `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are honoured where a\n\
         repository is fetched.\n",
    );
    for (group, settings) in groups() {
        let _ = write!(text, "\n## {}\n\n", group.title());
        match settings.iter().map(|setting| setting.section()).find(|name| !name.is_empty()) {
            Some(section) => text.push_str(&format!("Section `[{section}]` of the file.\n\n")),
            None => text.push_str("At the top of the file, before any section.\n\n"),
        }
        text.push_str("| name in the file | flag and variable | values | default | why |\n| --- | --- | --- | --- | --- |\n");
        for setting in settings {
            let preset = match (setting.preset, setting.default_value()) {
                (Preset::Value(_), Some(value)) => format!("`{}`", value.to_toml(setting.kind)),
                (Preset::Value(what) | Preset::Derived(what), _) => what.to_owned(),
            };
            let _ = writeln!(
                text,
                "| `{}` | `--{}`<br>`{}` | {} | {preset} | {} |",
                setting.name(),
                setting.flag(),
                setting.variable(),
                setting.kind.describe(),
                setting.help,
            );
        }
    }
    text
}

/// The effective values, one per line with its origin.
pub(super) fn effective(entries: &[Entry]) -> String {
    let mut text = String::new();
    let mut section = "";
    for entry in entries {
        if entry.setting.section() != section {
            section = entry.setting.section();
            let _ = write!(text, "\n[{section}]\n");
        }
        let name = entry.setting.name();
        let line = match (&entry.value, entry.setting.preset) {
            (Some(value), _) => format!("{name} = {}", value.to_toml(entry.setting.kind)),
            (None, Preset::Derived(what) | Preset::Value(what)) => format!("# {name}: {what}"),
        };
        let _ = writeln!(text, "{line:<44} # {}", entry.origin);
    }
    text
}
