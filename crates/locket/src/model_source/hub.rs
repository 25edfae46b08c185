//! Repositories of the Hugging Face hub, in the cache that the Python tools share.

use std::{path::PathBuf, sync::mpsc, time::Duration};

use hf_hub::{
    Cache, Repo,
    api::sync::{Api, ApiBuilder, ApiRepo},
};

use super::{
    RepositoryReference, SourceError,
    listing::{Choice, choose},
    progress::Progress,
};

/// The hub client has no time limit of its own; a network that swallows packets must not hang us.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const DOWNLOAD_TRIES: usize = 3;

/// Fetches what of a repository makes up the model; files in the cache are not fetched again.
/// Where the hub cannot be reached, a complete copy in the cache is used.
///
/// # Errors
/// [`SourceError::Hub`], [`SourceError::Choice`], [`SourceError::Offline`].
pub fn fetch(reference: &RepositoryReference, offline: bool) -> Result<PathBuf, SourceError> {
    let repository = &reference.repository;
    if offline {
        return cached(reference)?.ok_or_else(|| SourceError::Offline(repository.clone()));
    }
    let fail = |reason: String| SourceError::Hub { repository: repository.clone(), reason };
    let repo = api().map_err(&fail)?.model(repository.clone());
    let (repo, info) = match answer_in_time(move || (repo.info().map_err(|error| error.to_string()), repo)) {
        Ok((Ok(info), repo)) => (repo, info),
        Ok((Err(reason), _)) | Err(reason) => {
            return match cached(reference)? {
                Some(path) => {
                    tracing::warn!(
                        "cannot ask the hub about {repository} ({reason}); using the copy in its cache"
                    );
                    Ok(path)
                }
                None => Err(fail(reason)),
            };
        }
    };
    let names: Vec<String> = info.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
    let choice = chosen(reference, &names)?;
    let mut last = PathBuf::new();
    for file in choice.files() {
        last = get(&repo, repository, file, &info.sha).map_err(&fail)?;
    }
    Ok(opened(&choice, last))
}

/// A file of a repository if it is there and its content has this SHA-256, which is known before
/// anything is downloaded; `Ok(None)` if its content is another.
///
/// # Errors
/// The network's reason.
pub fn fetch_pinned(repository: &str, file: &'static str, sha256: &str) -> Result<Option<PathBuf>, String> {
    let api = api()?;
    let repo = api.model(repository.to_owned());
    let url = repo.url(file);
    // The etag of a large file is its SHA-256.
    let metadata = answer_in_time(move || api.metadata(&url).map_err(|error| error.to_string()))??;
    if metadata.etag() != sha256 {
        return Ok(None);
    }
    get(&repo, repository, file, metadata.commit_hash()).map(Some)
}

fn api() -> Result<Api, String> {
    // `HF_HOME`, `HF_ENDPOINT`; the token of the environment goes before the one on disk.
    let mut builder =
        ApiBuilder::from_env().with_retries(DOWNLOAD_TRIES).with_user_agent("locket", crate::VERSION);
    if let Ok(token) = std::env::var("HF_TOKEN")
        && !token.is_empty()
    {
        builder = builder.with_token(Some(token));
    }
    builder.build().map_err(|error| error.to_string())
}

/// A file of `repo`; one of commit `commit` that is in the cache is not fetched again.
fn get(repo: &ApiRepo, id: &str, file: &str, commit: &str) -> Result<PathBuf, String> {
    let cache = Cache::from_env();
    if cached_commit(&cache, id).as_deref() == Some(commit)
        && let Some(path) = cache.model(id.to_owned()).get(file)
    {
        return Ok(path);
    }
    let progress = Progress::new(file, 0);
    repo.download_with_progress(file, progress).map_err(|error| format!("{file}: {error}"))
}

/// The commit that the cache holds for the repository's main line.
fn cached_commit(cache: &Cache, id: &str) -> Option<String> {
    let repo = Repo::model(id.to_owned());
    let path = cache.path().join(repo.folder_name()).join("refs").join(repo.revision());
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// Runs a request on a thread of its own and waits for a bounded time. A thread that hangs in the
/// network is left behind; it holds a socket and nothing else.
fn answer_in_time<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    let (sender, receiver) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("locket-hub".into())
        .spawn(move || sender.send(ask()))
        .map_err(|error| error.to_string())?;
    receiver
        .recv_timeout(ANSWER_LIMIT)
        .map_err(|_| format!("the hub does not answer within {} seconds", ANSWER_LIMIT.as_secs()))
}

/// The latest snapshot in the cache, if it is complete.
fn cached(reference: &RepositoryReference) -> Result<Option<PathBuf>, SourceError> {
    let cache = Cache::from_env();
    let repo = Repo::model(reference.repository.clone());
    let Some(commit) = cached_commit(&cache, &reference.repository) else { return Ok(None) };
    let snapshot = cache.path().join(repo.folder_name()).join("snapshots").join(commit);
    let Ok(entries) = std::fs::read_dir(&snapshot) else { return Ok(None) };
    let names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    match choose(&names, reference.selector.as_deref()) {
        Ok(choice) => {
            let file = snapshot.join(choice.files().last().map_or("", String::as_str));
            Ok(Some(opened(&choice, file)))
        }
        Err(_) => Ok(None),
    }
}

fn chosen(reference: &RepositoryReference, names: &[String]) -> Result<Choice, SourceError> {
    choose(names, reference.selector.as_deref())
        .map_err(|reason| SourceError::Choice { repository: reference.repository.clone(), reason })
}

/// What `Checkpoint::open` is given: the file, or the folder that holds it.
fn opened(choice: &Choice, file: PathBuf) -> PathBuf {
    match choice {
        Choice::Gguf(_) => file,
        Choice::Folder(_) => file.parent().map(PathBuf::from).unwrap_or(file),
    }
}
