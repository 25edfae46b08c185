//! Held-out text: documents read from files, long enough for the context that is asked for.
//!
//! A file whose name ends in `.jsonl` or `.ndjson` has an object per line with `text` and, if it
//! likes, `name`; any other file is one document. Documents are the unit of every statistic, so a
//! document is never split into two samples.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use locket_processor::Processor;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde::Deserialize;

use crate::Error;

/// Longest line of a JSONL file, and longest plain file.
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;
/// Texts that are held before some are chosen; of more, a random sample.
const MAX_CANDIDATES: usize = 1024;
/// A document's first bytes per token of context that are kept: some five contexts of English.
const BYTES_PER_CONTEXT_TOKEN: usize = 24;

/// A tokenised document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The name it came with, or file and line.
    pub name: String,
    /// Token ids of its beginning, at least as many as asked for.
    pub ids: Vec<u32>,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Corpus {
    /// Documents that are long enough, in random order.
    pub documents: Vec<Document>,
    /// Documents in all files.
    pub read: usize,
    /// Documents that were found too short and left out.
    pub too_short: usize,
}

/// Which documents are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Tokens that a document must have.
    pub tokens: usize,
    /// Most documents.
    pub documents: usize,
    /// Seed of the choice among more.
    pub seed: u64,
}

#[derive(Debug)]
struct Candidate {
    name: String,
    text: String,
}

#[derive(Deserialize)]
struct Line {
    text: String,
    #[serde(default)]
    name: Option<String>,
}

/// Reads `paths` and tokenises a random choice of the documents that are long enough.
///
/// # Errors
/// [`Error::Text`] for a file that cannot be read or a line that is not as promised,
/// [`Error::Processor`] for text that the model has no token for.
pub fn read(paths: &[PathBuf], processor: &Processor, wanted: Wanted) -> Result<Corpus, Error> {
    let mut reader = Reader {
        min_bytes: wanted.tokens,
        max_bytes: wanted.tokens.saturating_mul(BYTES_PER_CONTEXT_TOKEN),
        rng: StdRng::seed_from_u64(wanted.seed),
        candidates: Vec::new(),
        long_enough: 0,
        read: 0,
    };
    for path in paths {
        reader.file(path)?;
    }
    let Reader { mut candidates, mut rng, read, long_enough, .. } = reader;
    candidates.shuffle(&mut rng);
    let mut corpus = Corpus { documents: Vec::new(), read, too_short: read - long_enough };
    for Candidate { name, text } in candidates {
        if corpus.documents.len() == wanted.documents {
            break;
        }
        let ids = processor.encode(&text, false)?;
        if ids.len() >= wanted.tokens {
            corpus.documents.push(Document { name, ids });
        } else {
            corpus.too_short += 1;
        }
    }
    Ok(corpus)
}

struct Reader {
    /// A token has at least one byte.
    min_bytes: usize,
    max_bytes: usize,
    rng: StdRng,
    candidates: Vec<Candidate>,
    long_enough: usize,
    read: usize,
}

impl Reader {
    fn file(&mut self, path: &Path) -> Result<(), Error> {
        let fail = |reason: String| Error::Text { path: path.to_owned(), reason };
        let mut file = BufReader::new(File::open(path).map_err(|error| fail(error.to_string()))?);
        let is_lines =
            path.extension().is_some_and(|kind| kind == "jsonl" || kind == "ndjson" || kind == "JSONL");
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !is_lines {
            let text = bounded(&mut file, None).map_err(fail)?;
            self.document(file_name, text);
            return Ok(());
        }
        for number in 1.. {
            let line =
                bounded(&mut file, Some(b'\n')).map_err(|reason| fail(format!("line {number}: {reason}")))?;
            if line.is_empty() {
                break;
            }
            if line.trim().is_empty() {
                continue;
            }
            let Line { text, name } = serde_json::from_str(&line).map_err(|error| {
                fail(format!("line {number} is not an object with a text named \"text\": {error}"))
            })?;
            self.document(name.unwrap_or_else(|| format!("{file_name}:{number}")), text);
        }
        Ok(())
    }

    /// Keeps a uniform sample of what may be long enough (Vitter's algorithm R).
    fn document(&mut self, name: String, mut text: String) {
        self.read += 1;
        if text.len() < self.min_bytes {
            return;
        }
        self.long_enough += 1;
        let cut = (0..=self.max_bytes.min(text.len())).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(cut.unwrap_or(0));
        text.shrink_to_fit();
        let candidate = Candidate { name, text };
        if self.candidates.len() < MAX_CANDIDATES {
            self.candidates.push(candidate);
        } else if let Some(place) = self.candidates.get_mut(self.rng.random_range(0..self.long_enough)) {
            *place = candidate;
        }
    }
}

/// Reads up to `end` (included) or the end of the file.
fn bounded(file: &mut impl BufRead, end: Option<u8>) -> Result<String, String> {
    let mut bytes = Vec::new();
    let mut limited = file.take(MAX_DOCUMENT_BYTES + 1);
    let read = match end {
        Some(end) => limited.read_until(end, &mut bytes),
        None => limited.read_to_end(&mut bytes),
    };
    read.map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(format!("it is longer than {MAX_DOCUMENT_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|error| format!("it is not UTF-8: {error}"))
}

/// A window of `tokens` at a random place of `document`, which must have as many.
pub(crate) fn window<'a>(document: &'a Document, tokens: usize, rng: &mut StdRng) -> &'a [u32] {
    let start = rng.random_range(0..=document.ids.len().saturating_sub(tokens));
    document.ids.get(start..start + tokens).unwrap_or(&document.ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::{byte_processor, folder_with};

    fn wanted(tokens: usize, documents: usize) -> Wanted {
        Wanted { tokens, documents, seed: 0 }
    }

    #[test]
    fn lines_and_plain_files_become_documents_and_short_ones_are_counted() {
        let (folder, processor) = byte_processor();
        let lines = r#"{"text": "abcdefghij", "name": "ten"}

{"text": "abc"}
{"text": "abcdefghijkl", "other": 1}
"#;
        let paths = folder_with(&folder, &[("a.jsonl", lines), ("b.txt", "ABCDEFGHIJK"), ("c.md", "x")]);
        let corpus = read(&paths, &processor, wanted(10, 9)).unwrap();
        let mut names: Vec<_> =
            corpus.documents.iter().map(|doc| (doc.name.as_str(), doc.ids.len())).collect();
        names.sort_unstable();
        assert_eq!(names, [("a.jsonl:4", 12), ("b.txt", 11), ("ten", 10)]);
        assert_eq!((corpus.read, corpus.too_short), (5, 2));
        let fewer = read(&paths, &processor, wanted(10, 2)).unwrap();
        assert_eq!(fewer.documents, corpus.documents[..2]);
        let other = Wanted { seed: 3, ..wanted(10, 9) };
        assert_ne!(read(&paths, &processor, other).unwrap().documents, corpus.documents);
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let (folder, processor) = byte_processor();
        let paths = folder_with(&folder, &[("a.txt", &"äöü".repeat(100))]);
        let corpus = read(&paths, &processor, wanted(3, 1)).unwrap();
        assert_eq!(corpus.documents[0].ids.len(), 3 * BYTES_PER_CONTEXT_TOKEN);
        let text = processor.decode(&corpus.documents[0].ids, false);
        assert!(text.chars().all(|c| "äöü".contains(c)), "{text}");
    }

    #[test]
    fn bad_files_are_named_with_the_line() {
        let (folder, processor) = byte_processor();
        let paths = folder_with(&folder, &[("a.jsonl", "{\"text\": \"a\"}\n{\"txt\": 1}\n")]);
        let text = read(&paths, &processor, wanted(1, 1)).unwrap_err().to_string();
        assert!(text.contains("a.jsonl: line 2 is not an object with a text"), "{text}");
        let text = read(&["/none".into()], &processor, wanted(1, 1)).unwrap_err().to_string();
        assert!(text.contains("cannot read text from /none"), "{text}");
    }

    #[test]
    fn windows_lie_inside() {
        let document = Document { name: String::new(), ids: (0..20).collect() };
        let mut rng = StdRng::seed_from_u64(1);
        for tokens in [1, 19, 20] {
            for _ in 0..20 {
                let window = window(&document, tokens, &mut rng);
                assert_eq!(window.len(), tokens);
                assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
            }
        }
    }
}
