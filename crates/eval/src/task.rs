//! What can be measured.

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Negative log likelihood of held-out text, by position.
    Perplexity,
    /// A five-digit pass key, said once somewhere in the text and asked for at its end.
    Passkey,
    /// Eight numbers of eight cities, of which one is asked for.
    MultiKey,
    /// Going on with a passage of the text whose first words are quoted at the end.
    Copy,
    /// A list of words with labels, some of which are asked for at the end.
    ManyShot,
}

impl Task {
    /// Every task, in the order of reports.
    pub const ALL: [Self; 5] = [Self::Perplexity, Self::Passkey, Self::MultiKey, Self::Copy, Self::ManyShot];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Perplexity => "perplexity",
            Self::Passkey => "passkey",
            Self::MultiKey => "multi-key",
            Self::Copy => "copy",
            Self::ManyShot => "many-shot",
        }
    }
}

impl std::str::FromStr for Task {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|task| task.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|task| task.name()).collect();
            format!("unknown task {name:?}; known are {}", known.join(", "))
        })
    }
}

impl serde::Serialize for Task {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for task in Task::ALL {
            assert_eq!(task.name().parse(), Ok(task));
        }
        assert!("pass".parse::<Task>().unwrap_err().contains("passkey, multi-key"));
    }
}
