//! Memory limits of Linux control groups, version 1 and 2, the process's own group and all above.

use std::path::{Path, PathBuf};

/// Where control groups are mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// A group's limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Bytes that it leaves: limit minus use, page cache that can be dropped not counted as use.
    pub free: u64,
    /// The group's folder.
    pub folder: PathBuf,
}

/// Names of the files of one version.
struct Files {
    limit: &'static str,
    usage: &'static str,
    inactive_file: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    inactive_file: "total_inactive_file",
};
const V2: Files = Files { limit: "memory.max", usage: "memory.current", inactive_file: "inactive_file" };

/// The group that leaves the least; `None` where no limit is set or there are no control groups.
/// `own` is the process's `/proc/self/cgroup`.
pub fn tightest(mount: &Path, own: &Path) -> Option<Limit> {
    let own = std::fs::read_to_string(own).ok()?;
    let mut limits = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if controllers.split(',').any(|controller| controller == "memory") {
            limits.extend(chain(&mount.join("memory"), group, &V1));
        } else if controllers.is_empty() {
            limits.extend(chain(mount, group, &V2));
            limits.extend(chain(&mount.join("unified"), group, &V2));
        }
    }
    limits.into_iter().min_by_key(|limit| limit.free)
}

/// Limits of `group` and of its ancestors down to `root`. In a container the path may name groups
/// of the host that cannot be seen here; then only those that can be seen count.
fn chain(root: &Path, group: &str, files: &Files) -> Vec<Limit> {
    let own = root.join(group.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(root))
        .filter_map(|folder| read(folder, files))
        .collect()
}

fn read(folder: &Path, files: &Files) -> Option<Limit> {
    // "max", and version 1's nearly 2^63, are no limit.
    let limit = number(&folder.join(files.limit)).filter(|&limit| limit < 1 << 60)?;
    let usage = number(&folder.join(files.usage))?;
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let inactive = stat
        .lines()
        .find_map(|line| line.strip_prefix(files.inactive_file)?.trim().parse::<u64>().ok())
        .unwrap_or(0);
    let free = limit.saturating_sub(usage.saturating_sub(inactive));
    Some(Limit { free, folder: folder.to_owned() })
}

fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn version_2_takes_the_tightest_ancestor() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &[
                ("own", "0::/a/b\n"),
                ("a/memory.max", "1000\n"),
                ("a/memory.current", "900\n"),
                ("a/memory.stat", "anon 1\ninactive_file 300\nactive_file 9\n"),
                ("a/b/memory.max", "max\n"),
                ("a/b/memory.current", "10\n"),
            ],
        );
        let limit = tightest(root.path(), &root.path().join("own")).unwrap();
        assert_eq!((limit.free, limit.folder), (400, root.path().join("a")));
    }

    #[test]
    fn version_1_without_its_own_folder_uses_the_mount() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &[
                ("own", "9:cpu:/x\n4:memory:/docker/unseen\n0::/\n"),
                ("memory/memory.limit_in_bytes", "5000\n"),
                ("memory/memory.usage_in_bytes", "2000\n"),
                ("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n"),
            ],
        );
        assert_eq!(tightest(root.path(), &root.path().join("own")).unwrap().free, 3500);
        write(root.path(), &[("memory/memory.limit_in_bytes", "9223372036854771712\n")]);
        assert_eq!(tightest(root.path(), &root.path().join("own")), None);
        assert_eq!(tightest(root.path(), &root.path().join("no-such-file")), None);
    }
}
