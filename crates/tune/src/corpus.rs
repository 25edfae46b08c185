//! Training text from files, read in pieces: a corpus may be larger than memory.
//!
//! `*.jsonl` and `*.ndjson` hold one document per line, an object with a `text` field; every other file
//! is one document of plain text. Where reading stands is a few numbers ([`Place`]), so that a resumed
//! run goes on at the same byte.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// The longest line of a JSONL file that is read.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Plain text is handed out in pieces of about this size.
const PIECE_BYTES: usize = 256 << 10;

/// Where reading stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Index of the file.
    pub file: usize,
    /// Next byte of it.
    pub offset: u64,
    /// Lines of it that were read.
    pub line: u64,
}

/// A piece of text of one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub text: String,
    /// Whether it is the first piece of its document.
    pub begins_document: bool,
}

/// The files, read one after the other.
pub(crate) struct Corpus {
    files: Vec<PathBuf>,
    place: Place,
    open: Option<BufReader<File>>,
}

impl Corpus {
    /// Checks that there are files and that all can be opened.
    pub(crate) fn new(files: &[PathBuf]) -> Result<Self> {
        if files.is_empty() {
            return Err(Error::setting("data", "names no file"));
        }
        for path in files {
            let file = File::open(path).map_err(Error::io("cannot read", path))?;
            let metadata = file.metadata().map_err(Error::io("cannot read", path))?;
            if !metadata.is_file() {
                return Err(Error::setting("data", format!("{} is not a file", path.display())));
            }
        }
        Ok(Self { files: files.to_owned(), place: Place::default(), open: None })
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Goes on from `place`.
    pub(crate) fn seek(&mut self, place: Place) {
        self.place = place;
        self.open = None;
    }

    /// The next piece, or `None` at the end of the last file; the piece after that is the first again.
    pub(crate) fn next(&mut self) -> Result<Option<Piece>> {
        while let Some(path) = self.files.get(self.place.file).cloned() {
            let piece = if is_jsonl(&path) { self.next_line(&path) } else { self.next_plain(&path) }?;
            if piece.is_some() {
                return Ok(piece);
            }
            self.seek(Place { file: self.place.file + 1, offset: 0, line: 0 });
        }
        self.seek(Place::default());
        Ok(None)
    }

    fn reader(&mut self, path: &Path) -> Result<&mut BufReader<File>> {
        if self.open.is_none() {
            let mut file = File::open(path).map_err(Error::io("cannot read", path))?;
            file.seek(SeekFrom::Start(self.place.offset)).map_err(Error::io("cannot read", path))?;
            self.open = Some(BufReader::new(file));
        }
        Ok(self.open.as_mut().expect("it was opened above"))
    }

    fn next_line(&mut self, path: &Path) -> Result<Option<Piece>> {
        loop {
            let mut line = Vec::new();
            let mut limited = self.reader(path)?.take(MAX_LINE_BYTES + 1);
            limited.read_until(b'\n', &mut line).map_err(Error::io("cannot read", path))?;
            if line.is_empty() {
                return Ok(None);
            }
            self.place.offset += line.len() as u64;
            self.place.line += 1;
            let wrong = |reason: String| Error::Line { path: path.to_owned(), line: self.place.line, reason };
            if line.len() as u64 > MAX_LINE_BYTES {
                return Err(wrong(format!(
                    "is longer than {} MiB; split the document",
                    MAX_LINE_BYTES >> 20
                )));
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let Document { text } = serde_json::from_slice(&line)
                .map_err(|error| wrong(format!("is not an object with a text field: {error}")))?;
            return Ok(Some(Piece { text, begins_document: true }));
        }
    }

    fn next_plain(&mut self, path: &Path) -> Result<Option<Piece>> {
        let mut bytes = Vec::new();
        let begins_document = self.place.offset == 0;
        // What a cut leaves over is read again: the place stays a single number.
        self.open = None;
        let mut limited = self.reader(path)?.take(PIECE_BYTES as u64);
        limited.read_to_end(&mut bytes).map_err(Error::io("cannot read", path))?;
        let is_last = bytes.len() < PIECE_BYTES;
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            // A character that is cut at the end belongs to the next piece.
            Err(error) if error.error_len().is_none() && !is_last => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default()
            }
            Err(error) => {
                let at = self.place.offset + error.valid_up_to() as u64;
                return Err(Error::Corpus(format!("{} is not UTF-8 at byte {at}", path.display())));
            }
        };
        // Tokenizers attach a space to the word after it, so a piece ends before one.
        let cut = if is_last { text.len() } else { cut_before_blank(text) };
        self.place.offset += cut as u64;
        let text = text[..cut].to_owned();
        Ok((cut > 0).then_some(Piece { text, begins_document }))
    }
}

#[derive(Deserialize)]
struct Document {
    text: String,
}

fn is_jsonl(path: &Path) -> bool {
    path.extension()
        .is_some_and(|end| end.eq_ignore_ascii_case("jsonl") || end.eq_ignore_ascii_case("ndjson"))
}

fn cut_before_blank(text: &str) -> usize {
    match text.rfind(char::is_whitespace) {
        Some(at) if at > 0 => at,
        _ => text.len(),
    }
}

/// SHA-256 over the files' lengths and bytes in order, in hexadecimal: names the training data.
pub(crate) fn hash(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files {
        let failed = || Error::io("cannot read", path);
        let mut file = File::open(path).map_err(failed())?;
        hash.update(file.metadata().map_err(failed())?.len().to_le_bytes());
        loop {
            let count = file.read(&mut buffer).map_err(failed())?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(contents: &[(&str, &[u8])]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let paths = contents.iter().map(|(name, bytes)| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        });
        let paths = paths.collect();
        (folder, paths)
    }

    fn all(corpus: &mut Corpus) -> Vec<Piece> {
        std::iter::from_fn(|| corpus.next().unwrap()).collect()
    }

    #[test]
    fn documents_are_lines_or_files() {
        let lines = b"{\"text\": \"one\", \"id\": 1}\n\n{\"text\": \"two\"}";
        let (_folder, paths) =
            files(&[("a.jsonl", lines), ("empty.txt", b""), ("b.txt", b"plain\ntext"), ("e.jsonl", b"")]);
        let mut corpus = Corpus::new(&paths).unwrap();
        for _ in 0..2 {
            let texts: Vec<_> = all(&mut corpus).into_iter().map(|p| (p.text, p.begins_document)).collect();
            let expected = ["one", "two", "plain\ntext"].map(|text| (text.to_owned(), true));
            assert_eq!(texts, expected, "the end is followed by the beginning");
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        let (_folder, paths) = files(&[("a.jsonl", b"{\"text\": \"one\"}\n{\"txt\": 3}\n")]);
        let mut corpus = Corpus::new(&paths).unwrap();
        corpus.next().unwrap();
        let error = corpus.next().unwrap_err().to_string();
        assert!(error.contains("a.jsonl, line 2: is not an object with a text field"), "{error}");
        let (_folder, paths) = files(&[("b.txt", b"ab\xff")]);
        let error = Corpus::new(&paths).unwrap().next().unwrap_err().to_string();
        assert!(error.contains("not UTF-8 at byte 2"), "{error}");
        assert!(Corpus::new(&[]).is_err());
        assert!(Corpus::new(&["absent.txt".into()]).is_err());
    }

    #[test]
    fn a_long_document_comes_in_pieces_and_can_be_continued() {
        let long: String = (0..120_000).map(|i| format!("wörd{i} ")).collect();
        let (_folder, paths) = files(&[("long.txt", long.as_bytes()), ("short.txt", b"end")]);
        let mut corpus = Corpus::new(&paths).unwrap();
        let first = corpus.next().unwrap().unwrap();
        assert!(first.begins_document && first.text.len() <= PIECE_BYTES);
        let place = corpus.place();
        let rest = all(&mut corpus);
        assert!(rest.len() > 3 && !rest[0].begins_document && rest[0].text.starts_with(" wörd"));
        let joined: String = std::iter::once(&first).chain(&rest).map(|piece| piece.text.as_str()).collect();
        assert_eq!(joined, long + "end");
        corpus.seek(place);
        assert_eq!(all(&mut corpus), rest);
    }

    #[test]
    fn the_hash_depends_on_bytes_and_order() {
        let (_folder, paths) = files(&[("a.txt", b"ab"), ("b.txt", b"c"), ("c.txt", b"a"), ("d.txt", b"bc")]);
        let hashes: Vec<_> = [[0, 1], [1, 0], [2, 3]]
            .map(|order| hash(&order.map(|at: usize| paths[at].clone())).unwrap())
            .into();
        assert_eq!(hashes[0].len(), 64);
        assert!(hashes[0] != hashes[1] && hashes[0] != hashes[2] && hashes[1] != hashes[2]);
    }
}
