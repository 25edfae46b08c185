//! Pages with questions: a JSONL file beside its images.
//!
//! A line is `{"image": "00000.png", "kind": "form", "questions": [{"question": "...", "answer": "..."}]}`;
//! the image's path is relative to the file. `benches/vqa/make_pages.py` makes such files.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::Error;

/// Longest line, and largest image file.
const MOST_LINE_BYTES: u64 = 1 << 20;
const MOST_IMAGE_BYTES: u64 = 64 << 20;

/// An image and what is asked about it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// The image's file.
    pub image: PathBuf,
    /// What kind of page it is; accuracies are also given by kind.
    #[serde(default = "some_kind")]
    pub kind: String,
    /// At least one.
    pub questions: Vec<Question>,
}

fn some_kind() -> String {
    "page".to_owned()
}

/// A question with one right answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// What is asked.
    pub question: String,
    /// The whole answer, up to the end of the turn.
    pub answer: String,
}

/// Reads at most `most` pages of `path`.
///
/// # Errors
/// [`Error::Text`] naming file and line.
pub fn read(path: &Path, most: usize) -> Result<Vec<Page>, Error> {
    let failed = |reason: String| Error::Text { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut lines = BufReader::new(file);
    let (mut pages, mut line) = (Vec::new(), String::new());
    for number in 1.. {
        line.clear();
        let read = (&mut lines).take(MOST_LINE_BYTES).read_line(&mut line);
        let read = read.map_err(|error| failed(format!("line {number}: {error}")))?;
        if read == 0 || pages.len() == most {
            break;
        }
        if read as u64 == MOST_LINE_BYTES {
            return Err(failed(format!("line {number} is longer than {MOST_LINE_BYTES} bytes")));
        }
        if line.trim().is_empty() {
            continue;
        }
        let mut page: Page =
            serde_json::from_str(&line).map_err(|error| failed(format!("line {number}: {error}")))?;
        if page.questions.is_empty() || page.questions.iter().any(|question| question.answer.is_empty()) {
            return Err(failed(format!("line {number}: a page needs questions, and each an answer")));
        }
        page.image = folder.join(page.image);
        pages.push(page);
    }
    if pages.is_empty() {
        return Err(failed("has no pages".into()));
    }
    Ok(pages)
}

/// The bytes of a page's image.
///
/// # Errors
/// [`Error::Text`] if it cannot be read or is larger than 64 MiB.
pub fn image_bytes(page: &Page) -> Result<Vec<u8>, Error> {
    let failed = |reason: String| Error::Text { path: page.image.clone(), reason };
    let file = std::fs::File::open(&page.image).map_err(|error| failed(error.to_string()))?;
    let mut bytes = Vec::new();
    let read = file.take(MOST_IMAGE_BYTES + 1).read_to_end(&mut bytes);
    match read.map_err(|error| failed(error.to_string()))? {
        read if read as u64 > MOST_IMAGE_BYTES => {
            Err(failed(format!("has more than {MOST_IMAGE_BYTES} bytes")))
        }
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Vec<Page>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages.jsonl");
        std::fs::write(&path, text).unwrap();
        read(&path, 2).map_err(|error| error.to_string())
    }

    #[test]
    fn pages_are_read_and_mistakes_have_lines() {
        let line = r#"{"image": "a.png", "kind": "form", "questions": [{"question": "q", "answer": "a"}]}"#;
        let pages = read_text(&format!("{line}\n\n{line}\n{line}\n")).unwrap();
        assert_eq!((pages.len(), pages[0].kind.as_str()), (2, "form"));
        assert!(pages[0].image.ends_with("a.png") && pages[0].image.parent().unwrap() != Path::new(""));
        assert!(read_text("").unwrap_err().contains("has no pages"));
        assert!(read_text(&format!("{line}\n{{}}")).unwrap_err().contains("line 2: missing field `image`"));
        let empty = r#"{"image": "a.png", "questions": []}"#;
        assert!(read_text(empty).unwrap_err().contains("line 1: a page needs questions"));
        let missing = Page { image: "/nowhere/a.png".into(), kind: some_kind(), questions: Vec::new() };
        assert!(image_bytes(&missing).is_err());
    }
}
