//! One snapshot as a file.
//!
//! ```text
//! magic "LOCKETSN"  version u32  header_len u32                          16 bytes
//! fingerprint [32]  page [32]  len u32  image_len u64
//! tail_len u32  tail [tail_len] u32  settings_len u32  settings (UTF-8)   header_len bytes
//! SHA-256 of all the above                                               32 bytes
//! tokens [len] u32  image [image_len]
//! SHA-256 of the header's digest, tokens and image                       32 bytes
//! ```
//!
//! Little-endian. The tenant's salt is not written: it is part of `page`, which cannot be inverted.
//! A file is complete or it does not exist under its name: it is written under a temporary name,
//! synchronised and renamed. Nothing in it is believed before its digest is.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::SystemTime,
};

use sha2::{Digest as _, Sha256};

use super::{
    key::{Digest, PAGE_TOKENS, SnapshotKey},
    store::Snapshot,
};

const MAGIC: [u8; 8] = *b"LOCKETSN";
/// Changes with the layout above.
const VERSION: u32 = 1;
/// Far above any header that is written.
const MAX_HEADER_BYTES: u32 = 4096;
const DIGEST_BYTES: u64 = 32;

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Whole, as far as one can tell, but of another format, version or model.
    #[error("it is foreign: {0}")]
    Foreign(&'static str),
    /// Not what was written.
    #[error("it is broken: {0}")]
    Corrupt(&'static str),
    /// It cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What a file says about itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The model and cache that wrote it.
    pub fingerprint: Digest,
    /// The snapshot's key.
    pub key: SnapshotKey,
    /// Cache settings in words.
    pub settings: String,
    /// Bytes of the image.
    pub image_len: u64,
}

impl Header {
    /// The bytes up to and with the header's digest.
    fn encode(&self) -> Vec<u8> {
        let mut fields = Vec::new();
        fields.extend_from_slice(&self.fingerprint);
        fields.extend_from_slice(&self.key.page);
        fields.extend_from_slice(&self.key.len.to_le_bytes());
        fields.extend_from_slice(&self.image_len.to_le_bytes());
        fields.extend_from_slice(&(self.key.tail.len() as u32).to_le_bytes());
        self.key.tail.iter().for_each(|id| fields.extend_from_slice(&id.to_le_bytes()));
        fields.extend_from_slice(&(self.settings.len() as u32).to_le_bytes());
        fields.extend_from_slice(self.settings.as_bytes());
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(fields.len() as u32).to_le_bytes());
        bytes.append(&mut fields);
        let digest = Sha256::digest(&bytes);
        bytes.extend_from_slice(&digest);
        bytes
    }

    /// Reads a header and its digest from the front of a file of `file_len` bytes.
    fn decode(file: &mut impl Read, file_len: u64, fingerprint: &Digest) -> Result<(Self, Digest), Refusal> {
        let mut start = [0; 16];
        file.read_exact(&mut start).map_err(|error| truncated(error, "it ends in its header"))?;
        let number = |at: usize| u32::from_le_bytes([start[at], start[at + 1], start[at + 2], start[at + 3]]);
        if start[..8] != MAGIC {
            return Err(Refusal::Foreign("not a snapshot"));
        }
        if number(8) != VERSION {
            return Err(Refusal::Foreign("another version of the format"));
        }
        let header_len = number(12);
        if header_len > MAX_HEADER_BYTES {
            return Err(Refusal::Corrupt("its header is too long"));
        }
        let mut rest = vec![0; header_len as usize + DIGEST_BYTES as usize];
        file.read_exact(&mut rest).map_err(|error| truncated(error, "it ends in its header"))?;
        let (fields, digest) = rest.split_at(header_len as usize);
        let expected: Digest = Sha256::new().chain_update(start).chain_update(fields).finalize().into();
        if digest != expected {
            return Err(Refusal::Corrupt("its header does not have its checksum"));
        }
        let header = Self::parse(fields).ok_or(Refusal::Corrupt("its header has other fields"))?;
        if header.fingerprint != *fingerprint {
            return Err(Refusal::Foreign("of another model, cache format or version"));
        }
        if header.file_len(header_len) != Some(file_len) {
            return Err(Refusal::Corrupt("its length is not what its header says"));
        }
        Ok((header, expected))
    }

    fn parse(fields: &[u8]) -> Option<Self> {
        let (fingerprint, fields) = fields.split_first_chunk::<32>()?;
        let (page, fields) = fields.split_first_chunk::<32>()?;
        let (len, fields) = fields.split_first_chunk::<4>()?;
        let (image_len, fields) = fields.split_first_chunk::<8>()?;
        let (tail_len, fields) = fields.split_first_chunk::<4>()?;
        let tail_len = u32::from_le_bytes(*tail_len) as usize;
        let len = u32::from_le_bytes(*len);
        if tail_len != len as usize % PAGE_TOKENS {
            return None;
        }
        let (tail, fields) = fields.split_at_checked(4 * tail_len)?;
        let (settings_len, settings) = fields.split_first_chunk::<4>()?;
        let is_whole = u32::from_le_bytes(*settings_len) as usize == settings.len();
        Some(Self {
            fingerprint: *fingerprint,
            key: SnapshotKey { page: *page, tail: words(tail).into(), len },
            settings: String::from_utf8(settings.to_vec()).ok().filter(|_| is_whole)?,
            image_len: u64::from_le_bytes(*image_len),
        })
    }

    fn file_len(&self, header_len: u32) -> Option<u64> {
        let fixed = 16 + u64::from(header_len) + 2 * DIGEST_BYTES + 4 * u64::from(self.key.len);
        fixed.checked_add(self.image_len)
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|word| u32::from_le_bytes(*word)).collect()
}

fn truncated(error: io::Error, place: &'static str) -> Refusal {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Refusal::Corrupt(place),
        _ => Refusal::Io(error),
    }
}

/// Bytes of the file that [`write`] makes.
pub(crate) fn file_bytes(fingerprint: &Digest, snapshot: &Snapshot) -> u64 {
    let header = header_of(fingerprint, snapshot).encode().len() as u64;
    header + 4 * snapshot.tokens.len() as u64 + snapshot.image.len() as u64 + DIGEST_BYTES
}

fn header_of(fingerprint: &Digest, snapshot: &Snapshot) -> Header {
    Header {
        fingerprint: *fingerprint,
        key: snapshot.key.clone(),
        settings: snapshot.settings.clone(),
        image_len: snapshot.image.len() as u64,
    }
}

/// Writes `snapshot` as `path`, readable by the owner only; `temporary` is in the same directory.
/// Either the whole file is there afterwards, and stays over a loss of power, or none.
pub(crate) fn write(
    path: &Path,
    temporary: &Path,
    fingerprint: &Digest,
    snapshot: &Snapshot,
) -> io::Result<()> {
    let written =
        write_temporary(temporary, fingerprint, snapshot).and_then(|()| fs::rename(temporary, path));
    if written.is_err() {
        // Nothing is lost if it is not there; what stays is swept at the next start.
        let _ = fs::remove_file(temporary);
        return written;
    }
    // The new name is durable once the directory is.
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

fn write_temporary(temporary: &Path, fingerprint: &Digest, snapshot: &Snapshot) -> io::Result<()> {
    let header = header_of(fingerprint, snapshot).encode();
    let tokens: Vec<u8> = snapshot.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
    let digest = Sha256::new()
        .chain_update(&header[header.len() - DIGEST_BYTES as usize..])
        .chain_update(&tokens)
        .chain_update(&snapshot.image)
        .finalize();
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    for part in [header.as_slice(), &tokens, &snapshot.image, &digest] {
        file.write_all(part)?;
    }
    file.sync_all()
}

/// Reads the header of `path` and checks that the file is as long as it should be.
pub(crate) fn read_header(path: &Path, fingerprint: &Digest) -> Result<Header, Refusal> {
    let mut file = File::open(path)?;
    let file_len = file.metadata()?.len();
    Ok(Header::decode(&mut file, file_len, fingerprint)?.0)
}

/// Reads tokens, image and settings of the snapshot `key`, which has `image_len` bytes.
pub(crate) fn read(
    path: &Path,
    fingerprint: &Digest,
    key: &SnapshotKey,
    image_len: u64,
) -> Result<(Vec<u32>, Vec<u8>, String), Refusal> {
    let mut file = File::open(path)?;
    let file_len = file.metadata()?.len();
    let (header, header_digest) = Header::decode(&mut file, file_len, fingerprint)?;
    if header.key != *key || header.image_len != image_len {
        return Err(Refusal::Corrupt("it has changed since the start"));
    }
    // The file is that long, so this allocates what can be read.
    let mut tokens = vec![0; 4 * key.len as usize];
    let mut image = vec![0; image_len as usize];
    let mut digest: Digest = [0; 32];
    for part in [&mut tokens[..], &mut image, &mut digest] {
        file.read_exact(part).map_err(|error| truncated(error, "it ends too early"))?;
    }
    let expected = Sha256::new().chain_update(header_digest).chain_update(&tokens).chain_update(&image);
    if digest != <Digest>::from(expected.finalize()) {
        return Err(Refusal::Corrupt("it does not have its checksum"));
    }
    // Order of use outlives a restart; where the time cannot be set, age decides.
    let _ = file.set_modified(SystemTime::now());
    Ok((words(&tokens), image, header.settings))
}
