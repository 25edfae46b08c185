use std::{os::unix::fs::PermissionsExt as _, time::SystemTime};

use locket_model::kv_cache::CacheSettings;
use proptest::prelude::*;

use super::*;
use crate::snapshots::store::Store;

const FINGERPRINT: Digest = [9; 32];

fn chain(ids: &[u32]) -> KeyChain {
    KeyChain::new(&FINGERPRINT, &CacheSettings::full(1), b"", ids)
}

fn snapshot(ids: &[u32], image: Vec<u8>) -> Snapshot {
    let room = Store::new(u64::MAX).make_room(0, &mut 0).unwrap();
    let chain = chain(ids);
    let settings = chain.settings().to_owned();
    Snapshot { key: chain.key(ids), tokens: ids.to_vec(), settings, image, _room: room }
}

fn metrics() -> SnapshotMetrics {
    let registry = prometheus::Registry::new();
    let facts = crate::EngineFacts::of(&crate::fake_model::FakeModel::new(&[(64, 2)], 64));
    let config = crate::EngineConfig::default();
    let metrics = crate::metrics::EngineMetrics::register(&registry, &config, &facts).unwrap();
    metrics.snapshots().clone()
}

#[test]
fn only_the_owner_may_read() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("new/snapshots");
    let mut disk = Disk::open(&directory, 1 << 20, FINGERPRINT, metrics(), || {}).unwrap();
    disk.write(Arc::new(snapshot(&[1, 2, 3], vec![4; 10])), true);
    disk.close(Duration::from_secs(60));
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    let path = disk.shared.path(&chain(&[1, 2, 3]).key(&[1, 2, 3]));
    assert_eq!(mode(&path), 0o600);
    assert!(!temporary(&path).exists());
}

#[test]
fn order_of_use_outlives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let keys: Vec<SnapshotKey> = (0..3).map(|id| chain(&[id]).key(&[id])).collect();
    let mut disk = Disk::open(directory.path(), 1 << 20, FINGERPRINT, metrics(), || {}).unwrap();
    (0..3).for_each(|id| disk.write(Arc::new(snapshot(&[id], vec![0; 100])), true));
    disk.close(Duration::from_secs(60));
    let bytes = disk.shared.index().bytes;
    // Used in the order 2, 0, 1.
    for (age, at) in [(30, 2), (20, 0), (10, 1)] {
        let file = File::open(disk.shared.path(&keys[at])).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    }
    drop(disk);
    let disk = Disk::open(directory.path(), bytes * 2 / 3, FINGERPRINT, metrics(), || {}).unwrap();
    let mut index = disk.shared.index();
    let left: Vec<bool> = keys.iter().map(|key| index.files.touch(key).is_some()).collect();
    assert_eq!(left, [true, true, false]);
}

#[test]
fn a_busy_writer_drops_borders_first() {
    let directory = tempfile::tempdir().unwrap();
    let mut disk = Disk::open(directory.path(), 1 << 20, FINGERPRINT, metrics(), || {}).unwrap();
    // As if so many were queued already.
    disk.shared.num_queued.store(WRITE_QUEUE - KEPT_FOR_ENDS, Ordering::SeqCst);
    disk.write(Arc::new(snapshot(&[1], vec![0; 10])), false);
    disk.write(Arc::new(snapshot(&[2], vec![0; 10])), true);
    disk.shared.num_queued.store(WRITE_QUEUE, Ordering::SeqCst);
    disk.write(Arc::new(snapshot(&[3], vec![0; 10])), true);
    disk.close(Duration::from_secs(60));
    let mut index = disk.shared.index();
    let written = [1, 2, 3].map(|id| index.files.touch(&chain(&[id]).key(&[id])).is_some());
    assert_eq!(written, [false, true, false]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is written is read; one changed byte, or one byte less, is refused.
    #[test]
    fn a_file_is_whole_or_refused(
        ids in prop::collection::vec(any::<u32>(), 1..40),
        image in prop::collection::vec(any::<u8>(), 0..200),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.snapshot");
        let written = snapshot(&ids, image.clone());
        file::write(&path, &temporary(&path), &FINGERPRINT, &written).unwrap();
        let read = || file::read(&path, &FINGERPRINT, &written.key, image.len() as u64);
        let expected = (ids, image.clone(), written.settings.clone());
        prop_assert_eq!(read().unwrap(), expected);
        let whole = std::fs::read(&path).unwrap();
        prop_assert_eq!(whole.len() as u64, file::file_bytes(&FINGERPRINT, &written));
        let mut changed = whole.clone();
        changed[at.index(whole.len())] ^= flip;
        std::fs::write(&path, &changed).unwrap();
        prop_assert!(read().is_err());
        std::fs::write(&path, &whole[..at.index(whole.len())]).unwrap();
        prop_assert!(read().is_err() && file::read_header(&path, &FINGERPRINT).is_err());
        std::fs::write(&path, &whole).unwrap();
        let foreign = file::read_header(&path, &[8; 32]);
        prop_assert!(matches!(foreign, Err(Refusal::Foreign(_))));
    }
}
