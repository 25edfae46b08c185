//! Which files of a repository make up the model.

/// What to fetch and what to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// One GGUF file.
    Gguf(String),
    /// `config.json`, safetensors, and what of the tokenizer's files is there.
    Folder(Vec<String>),
}

impl Choice {
    /// All files.
    pub fn files(&self) -> &[String] {
        match self {
            Self::Gguf(file) => std::slice::from_ref(file),
            Self::Folder(files) => files,
        }
    }
}

/// Small files that belong to a safetensors checkpoint if they exist.
const SIDE_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// Chosen in this order where a repository has many GGUF files and none was asked for: first the types
/// that have packed kernels, smallest and most exact first; other types are unpacked and slower.
const PREFERRED: [&str; 4] = ["Q4_1", "Q4_0", "Q8_0", "Q4_K_M"];

/// Chooses from the names of a repository's files.
///
/// Only plain names at the top of the repository count, so that no name leads out of the cache.
///
/// # Errors
/// What is missing or ambiguous, and what could be asked for.
pub fn choose(names: &[String], selector: Option<&str>) -> Result<Choice, String> {
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_plain(name)).collect();
    let ggufs: Vec<&str> =
        names.iter().copied().filter(|name| name.to_lowercase().ends_with(".gguf")).collect();
    if let Some(selector) = selector {
        return choose_gguf(&ggufs, selector);
    }
    let weights = safetensors(&names)?;
    if !weights.is_empty() && names.contains(&"config.json") {
        let side = SIDE_FILES.iter().copied().filter(|name| names.contains(name));
        let files = ["config.json"].into_iter().chain(side).chain(weights);
        return Ok(Choice::Folder(files.map(str::to_owned).collect()));
    }
    match ggufs.as_slice() {
        [] => Err("it has neither a .gguf file nor config.json with safetensors".into()),
        [one] => whole(one),
        many => match PREFERRED.iter().find_map(|name| unique(many, name)) {
            Some(file) => whole(file),
            None => Err(format!("it has several models; append one of :{}", many.join(", :"))),
        },
    }
}

fn is_plain(name: &str) -> bool {
    !name.starts_with('.') && !name.contains(['/', '\\', '\0']) && name.len() < 256
}

fn choose_gguf(ggufs: &[&str], selector: &str) -> Result<Choice, String> {
    if let Some(file) = ggufs.iter().find(|name| name.eq_ignore_ascii_case(selector)) {
        return whole(file);
    }
    match unique(ggufs, selector) {
        Some(file) => whole(file),
        None if ggufs.is_empty() => Err("it has no .gguf file to choose from".into()),
        None => Err(format!("{selector:?} is not exactly one of its files: {}", ggufs.join(", "))),
    }
}

/// The one file whose name has `part` as a word: between dots, dashes or the ends.
fn unique<'n>(ggufs: &[&'n str], part: &str) -> Option<&'n str> {
    let mut found = ggufs.iter().filter(|name| {
        let stem = &name[..name.len() - ".gguf".len()];
        let (stem, part) = (stem.to_lowercase(), part.to_lowercase());
        stem.match_indices(&part).any(|(at, _)| {
            let border = |c: Option<char>| c.is_none_or(|c| matches!(c, '.' | '-'));
            border(stem[..at].chars().next_back()) && border(stem[at + part.len()..].chars().next())
        })
    });
    match (found.next(), found.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

fn whole(file: &str) -> Result<Choice, String> {
    match shard_count(file.strip_suffix(".gguf").unwrap_or(file)) {
        Some(count) if count > 1 => Err(format!("{file} is one of {count} parts; join them first")),
        _ => Ok(Choice::Gguf(file.to_owned())),
    }
}

/// The safetensors that make up the model: `model.safetensors`, or all its shards.
fn safetensors<'n>(names: &[&'n str]) -> Result<Vec<&'n str>, String> {
    if let Some(single) = names.iter().find(|name| **name == "model.safetensors") {
        return Ok(vec![single]);
    }
    let mut shards: Vec<&str> =
        names.iter().copied().filter(|n| n.starts_with("model-") && n.ends_with(".safetensors")).collect();
    shards.sort_unstable();
    let counts: Vec<_> =
        shards.iter().map(|name| shard_count(name.trim_end_matches(".safetensors"))).collect();
    match counts.first() {
        None => Ok(shards),
        Some(first)
            if first.is_some_and(|count| count == shards.len()) && counts.iter().all(|c| c == first) =>
        {
            Ok(shards)
        }
        Some(_) => Err(format!("its safetensors are not complete: {}", shards.join(", "))),
    }
}

/// 3 of `name-00001-of-00003`.
fn shard_count(stem: &str) -> Option<usize> {
    let (front, count) = stem.rsplit_once("-of-")?;
    let (_, index) = front.rsplit_once('-')?;
    index.parse::<usize>().ok()?;
    count.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn gguf_by_file_quantisation_and_preference() {
        let files = names(&["M.Q4_K_M.gguf", "M.Q4_K_S.gguf", "M.Q8_0.gguf", "M-f16.gguf", "README.md"]);
        let chosen = |selector| choose(&files, selector).map(|choice| choice.files()[0].clone());
        assert_eq!(chosen(None), Ok("M.Q8_0.gguf".into()), "it has packed kernels");
        let all = names(&["M.Q8_0.gguf", "M.Q4_0.gguf", "M.Q4_1.gguf", "M.Q4_K_M.gguf"]);
        assert_eq!(choose(&all, None), Ok(Choice::Gguf("M.Q4_1.gguf".into())));
        let others = names(&["M.Q4_K_M.gguf", "M.Q6_K.gguf"]);
        assert_eq!(choose(&others, None), Ok(Choice::Gguf("M.Q4_K_M.gguf".into())));
        assert_eq!(chosen(Some("q8_0")), Ok("M.Q8_0.gguf".into()));
        assert_eq!(chosen(Some("F16")), Ok("M-f16.gguf".into()));
        assert_eq!(chosen(Some("M.Q4_K_S.gguf")), Ok("M.Q4_K_S.gguf".into()));
        assert!(chosen(Some("Q4_K")).is_err(), "a part of a word is not a name");
        assert!(chosen(Some("M")).is_err(), "ambiguous");
        assert!(choose(&names(&["a.gguf", "b.gguf"]), None).unwrap_err().contains(":a.gguf, :b.gguf"));
        assert!(choose(&names(&["a-00001-of-00002.gguf"]), None).unwrap_err().contains("parts"));
    }

    #[test]
    fn folders_whole_or_not_at_all() {
        let files = names(&["config.json", "model.safetensors", "tokenizer.json", "flax_model.msgpack"]);
        let folder = Choice::Folder(names(&["config.json", "tokenizer.json", "model.safetensors"]));
        assert_eq!(choose(&files, None), Ok(folder));
        let one = "model-00001-of-00002.safetensors";
        let two = "model-00002-of-00002.safetensors";
        let whole = choose(&names(&["config.json", two, one]), None).unwrap();
        assert_eq!(whole.files(), names(&["config.json", one, two]));
        assert!(choose(&names(&["config.json", one]), None).unwrap_err().contains("not complete"));
        assert!(choose(&names(&["config.json"]), None).is_err());
    }

    #[test]
    fn names_that_lead_elsewhere_do_not_count() {
        let files = names(&["../x.gguf", "a/b.gguf", "..\\y.gguf", ".z.gguf"]);
        assert!(choose(&files, None).unwrap_err().contains("neither"));
        assert!(choose(&files, Some("../x.gguf")).is_err());
    }
}
