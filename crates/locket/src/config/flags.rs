//! Command-line flags of all settings.

use std::{fmt, path::PathBuf};

use super::{
    setting::{Kind, Preset, Setting},
    table::SETTINGS,
    value,
};

/// Command-line flags of all settings, generated from the table.
#[derive(Clone, Default)]
pub struct SettingFlags {
    /// Key and texts of every flag that was given.
    pub given: Vec<(&'static str, Vec<String>)>,
    /// `--config`.
    pub config: Option<PathBuf>,
}

/// Without the values, among which may be keys.
impl fmt::Debug for SettingFlags {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.given.iter().map(|(key, _)| key).collect();
        out.debug_struct("SettingFlags").field("given", &names).field("config", &self.config).finish()
    }
}

impl clap::Args for SettingFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let file = clap::Arg::new("config")
            .long("config")
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("Configuration file [environment: LOCKET_CONFIG] [default: ./locket.toml if it exists]");
        SETTINGS.iter().fold(command.arg(file), |command, setting| command.arg(flag_of(setting)))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

fn flag_of(setting: &'static Setting) -> clap::Arg {
    let preset = match setting.preset {
        Preset::Value("") => "none",
        Preset::Value(text) | Preset::Derived(text) => text,
    };
    let help = format!("{} [{}] [default: {preset}]", setting.help, setting.kind.describe());
    let arg = clap::Arg::new(setting.key)
        .long(setting.flag())
        .help(help)
        .help_heading(setting.group.title())
        .action(clap::ArgAction::Append)
        .allow_hyphen_values(false);
    match setting.kind {
        Kind::Switch => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("true|false")
            .action(clap::ArgAction::Set),
        kind if kind.is_list() => arg.value_name("LIST"),
        Kind::Choice(words) => arg.value_name(words.join("|")).action(clap::ArgAction::Set),
        Kind::Text { .. } => arg.value_name("TEXT").action(clap::ArgAction::Set),
        _ => arg.value_name("N").action(clap::ArgAction::Set),
    }
}

impl clap::FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &clap::ArgMatches) -> Result<Self, clap::Error> {
        let given = SETTINGS
            .iter()
            .filter_map(|setting| {
                let texts = matches.get_many::<String>(setting.key)?;
                let texts = texts.flat_map(|text| match setting.kind.is_list() {
                    true => value::split_list(text),
                    false => vec![text.clone()],
                });
                Some((setting.key, texts.collect()))
            })
            .collect();
        Ok(Self { given, config: matches.get_one::<PathBuf>("config").cloned() })
    }

    fn update_from_arg_matches(&mut self, matches: &clap::ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
