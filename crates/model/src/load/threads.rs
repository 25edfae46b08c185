//! How many CPU threads pay off.

use std::{collections::BTreeSet, num::NonZero, path::Path, thread::available_parallelism};

/// `requested`, or for 0 all physical cores that this process may use: the inner loops fill a
/// core's vector units and memory ports, so that a second thread on it gains nothing.
pub(super) fn resolve(requested: usize) -> usize {
    let usable = available_parallelism().map_or(1, NonZero::get);
    match requested {
        0 => physical_cores(Path::new("/")).map_or(usable, |cores| cores.min(usable)).max(1),
        threads => threads,
    }
}

/// Distinct cores among the CPUs in the affinity mask; `None` where the system does not tell.
fn physical_cores(root: &Path) -> Option<usize> {
    let status = std::fs::read_to_string(root.join("proc/self/status")).ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for cpu in cpu_list(allowed)? {
        let file = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        cores.insert(std::fs::read_to_string(root.join(file)).ok()?.trim().to_owned());
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// `0-2,5` as `[0, 1, 2, 5]`.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    const MAX_CPU: usize = 1 << 14;
    let mut cpus = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    //! A written-out `/proc` and `/sys` with two hyperthreads per core count as physical cores.

    use super::*;

    #[test]
    fn hyperthreads_count_once_and_masked_cpus_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-2,5\n");
        for (cpu, siblings) in [(0, "0,4"), (1, "1,5"), (2, "2,6"), (5, "1,5")] {
            write(&format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"), siblings);
        }
        assert_eq!(physical_cores(root.path()), Some(3));
        assert_eq!(physical_cores(Path::new("/nonexistent")), None);
    }

    #[test]
    fn an_explicit_number_is_taken_as_it_is() {
        assert_eq!(resolve(7), 7);
        assert!(resolve(0) >= 1);
    }
}
