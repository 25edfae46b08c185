//! Remembered turns in a file, so that conversations go on after a restart as they would have.
//!
//! ```text
//! magic "LOCKETTU"  version u32  SHA-256 of the model's name for itself [32]      44 bytes
//! records: key [32]  len u32  ids [len] u32  first 8 bytes of the SHA-256 of all that
//! ```
//!
//! Little-endian. Records are appended as turns end, by a thread of their own, and written anew without
//! those forgotten when there are too many. A process that is killed leaves whole records and perhaps
//! a part of one, which is cut off; nothing of a file of another model or version is used. What is lost
//! costs time, not answers: the text is tokenised then. The ids are conversations in clear, so
//! the file has mode 0600.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use sha2::{Digest as _, Sha256};

use super::Key;

const MAGIC: [u8; 8] = *b"LOCKETTU";
/// Changes with the layout above and with what keys are made of.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 44;
/// Bytes of a record beside its ids.
const RECORD_BYTES: usize = 32 + 4 + 8;
/// Turns that may wait to be written; more are not.
const MAX_WAITING: usize = 256;

/// A turn in the file.
pub(super) type Record = (Key, Arc<[u32]>);

enum Command {
    Append(Record),
    /// Write the file anew with these records.
    Rewrite(Vec<Record>),
}

/// The file's writer. Dropping it writes what waits.
#[derive(Debug)]
pub(super) struct Journal {
    commands: Option<SyncSender<Command>>,
    thread: Option<JoinHandle<()>>,
    /// Bytes of records in the file, once all that waits is written.
    bytes: usize,
    max_bytes: usize,
}

impl Journal {
    /// Reads the file, of which at most `max_bytes` of records are kept, and writes it anew with
    /// those that are whole. Another file or none is the same as an empty one.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(super) fn open(path: &Path, fingerprint: &str, max_bytes: usize) -> io::Result<(Self, Vec<Record>)> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let header = header(fingerprint);
        let mut records = read(path, &header, max_bytes)?;
        let mut bytes = 0;
        // The latest ones are at the end.
        let first = records.iter().rposition(|(_, ids)| {
            bytes += record_bytes(ids);
            bytes > max_bytes
        });
        records.drain(..first.map_or(0, |index| index + 1));
        let bytes = records.iter().map(|(_, ids)| record_bytes(ids)).sum();
        let mut writer = Writer { path: path.into(), header, file: rewritten(path, &header, &records)? };
        let (commands, waiting) = sync_channel(MAX_WAITING);
        let thread =
            std::thread::Builder::new().name("locket-turns".into()).spawn(move || writer.run(&waiting))?;
        let journal = Self { commands: Some(commands), thread: Some(thread), bytes, max_bytes };
        Ok((journal, records))
    }

    /// Writes a turn, some time soon; not at all if the disk is too slow.
    pub(super) fn append(&mut self, key: Key, ids: &Arc<[u32]>) {
        let command = Command::Append((key, Arc::clone(ids)));
        if self.commands.as_ref().is_some_and(|commands| commands.try_send(command).is_ok()) {
            self.bytes += record_bytes(ids);
        }
    }

    /// Whether the file has more than twice what is remembered at most.
    pub(super) fn is_too_long(&self) -> bool {
        self.bytes > self.max_bytes.saturating_mul(2)
    }

    /// Writes the file anew, some time soon, with these turns, the latest at the end.
    pub(super) fn rewrite(&mut self, records: Vec<Record>) {
        let bytes = records.iter().map(|(_, ids)| record_bytes(ids)).sum();
        let command = Command::Rewrite(records);
        if self.commands.as_ref().is_some_and(|commands| commands.try_send(command).is_ok()) {
            self.bytes = bytes;
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes turns panicked");
        }
    }
}

/// The thread's side.
struct Writer {
    path: PathBuf,
    header: [u8; HEADER_BYTES],
    file: File,
}

impl Writer {
    fn run(&mut self, commands: &Receiver<Command>) {
        while let Ok(command) = commands.recv() {
            let result = match command {
                // In one piece, so that a process that is killed leaves no hole.
                Command::Append(record) => self.file.write_all(&encode(&record)),
                Command::Rewrite(records) => {
                    rewritten(&self.path, &self.header, &records).map(|file| self.file = file)
                }
            };
            if let Err(error) = result {
                tracing::warn!(path = %self.path.display(), %error, "turns are not written any more");
                return;
            }
        }
    }
}

fn header(fingerprint: &str) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..].copy_from_slice(&Sha256::digest(fingerprint));
    header
}

fn record_bytes(ids: &[u32]) -> usize {
    RECORD_BYTES + size_of_val(ids)
}

fn encode((key, ids): &Record) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(record_bytes(ids));
    bytes.extend_from_slice(key);
    bytes.extend_from_slice(&(ids.len() as u32).to_le_bytes());
    ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
    let digest = Sha256::digest(&bytes);
    bytes.extend_from_slice(&digest[..8]);
    bytes
}

/// The record at the front of `bytes`, if it is whole, and what follows it.
fn decode(bytes: &[u8]) -> Option<(Record, &[u8])> {
    let (key, rest) = bytes.split_first_chunk::<32>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (ids, rest) = rest.split_at_checked((u32::from_le_bytes(*len) as usize).checked_mul(4)?)?;
    let (digest, rest) = rest.split_first_chunk::<8>()?;
    let expected = Sha256::digest(&bytes[..36 + ids.len()]);
    let ids = ids.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
    (expected[..8] == digest[..]).then_some(((*key, ids), rest))
}

/// The whole records of a file, of its end if it is very long.
fn read(path: &Path, header: &[u8; HEADER_BYTES], max_bytes: usize) -> io::Result<Vec<Record>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // A file of ours is at most twice as long, and what waited.
    let limit = (max_bytes as u64).saturating_mul(4).saturating_add(HEADER_BYTES as u64);
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(limit).read_to_end(&mut bytes)?;
    let Some(mut rest) = bytes.strip_prefix(header.as_slice()) else {
        if length > 0 {
            tracing::warn!(path = %path.display(), "turns of another model, version or program are not used");
        }
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    while let Some((record, after)) = decode(rest) {
        records.push(record);
        rest = after;
    }
    if !rest.is_empty() {
        tracing::warn!(path = %path.display(), bytes = rest.len(), "the end of the turns is broken and not used");
    }
    Ok(records)
}

/// Replaces the file by one with these records, open to be appended to.
fn rewritten(path: &Path, header: &[u8; HEADER_BYTES], records: &[Record]) -> io::Result<File> {
    let temporary = path.with_extension("tmp");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&temporary)?;
    let mut buffered = BufWriter::new(file);
    buffered.write_all(header)?;
    for record in records {
        buffered.write_all(&encode(record))?;
    }
    let file = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.sync_data()?;
    fs::rename(&temporary, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn record(name: u8, len: usize) -> Record {
        ([name; 32], vec![u32::from(name); len].into())
    }

    fn write(path: &Path, records: &[Record]) {
        let (mut journal, _) = Journal::open(path, "model", 1 << 20).expect("a file");
        records.iter().for_each(|(key, ids)| journal.append(*key, ids));
    }

    fn read_again(path: &Path) -> Vec<Record> {
        Journal::open(path, "model", 1 << 20).expect("a file").1
    }

    #[test]
    fn turns_come_back_and_only_the_owner_reads_them() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("made/turns");
        let records = [record(1, 3), record(2, 0), record(3, 500)];
        write(&path, &records);
        assert_eq!(read_again(&path), records);
        assert_eq!(read_again(&path), records, "written anew at the start");
        let mode = fs::metadata(&path).expect("the file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    /// Cut anywhere, or with any bit turned, what is before it is used and nothing behind it.
    #[test]
    fn a_broken_end_is_cut_off() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("turns");
        let records = [record(1, 3), record(2, 2)];
        write(&path, &records);
        let whole = fs::read(&path).expect("the file");
        let second = HEADER_BYTES + record_bytes(&records[0].1);
        for end in second..whole.len() {
            fs::write(&path, &whole[..end]).expect("written");
            assert_eq!(read_again(&path), records[..1], "{end}");
            let mut turned = whole.clone();
            turned[end] ^= 1;
            fs::write(&path, turned).expect("written");
            assert_eq!(read_again(&path), records[..1], "{end}");
        }
        // It goes on behind what is whole.
        write(&path, &records[1..]);
        assert_eq!(read_again(&path), records);
    }

    #[test]
    fn foreign_files_are_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("turns");
        write(&path, &[record(1, 3)]);
        assert_eq!(Journal::open(&path, "other", 1 << 20).expect("a file").1, []);
        assert_eq!(read_again(&path), []);
        fs::write(&path, "not turns").expect("written");
        assert_eq!(read_again(&path), []);
        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("a directory");
        assert!(Journal::open(&path, "model", 1 << 20).is_err());
    }

    #[test]
    fn the_file_is_bounded_and_keeps_the_latest() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("turns");
        let records: Vec<Record> = (0..10).map(|name| record(name, 10)).collect();
        write(&path, &records);
        let one = record_bytes(&records[0].1);
        let (mut journal, kept) = Journal::open(&path, "model", 3 * one + 1).expect("a file");
        assert_eq!(kept, records[7..]);
        assert!(!journal.is_too_long());
        records[..4].iter().for_each(|(key, ids)| journal.append(*key, ids));
        assert!(journal.is_too_long());
        journal.rewrite(records[..3].to_vec());
        assert!(!journal.is_too_long());
        journal.append(records[9].0, &records[9].1);
        drop(journal);
        assert_eq!(read_again(&path), [&records[..3], &records[9..]].concat());
    }
}
