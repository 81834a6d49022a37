//! How much memory this process may use: the control group's limit, or what the machine has.

use std::path::Path;

/// The least of the machine's memory and the limits of the process's control groups, version 2 or 1; `None` where
/// nothing says.
#[must_use]
pub fn limit_bytes() -> Option<u64> {
    limit_under(Path::new("/"))
}

fn limit_under(root: &Path) -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let total = read(&root.join("proc/meminfo")).and_then(|text| mem_total(&text));
    let groups = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let (mount, file) = if controllers.is_empty() {
            ("sys/fs/cgroup", "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
        } else {
            return None;
        };
        let mount = root.join(mount);
        // A parent's limit counts too; in a container the group's own path may not be mounted.
        Path::new(group.trim_start_matches('/'))
            .ancestors()
            .filter_map(|group| read(&mount.join(group).join(file))?.trim().parse::<u64>().ok())
            .min()
    });
    limits.chain(total).min()
}

/// `MemTotal` of `/proc/meminfo`, which is in KiB.
fn mem_total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(name: &str, files: &[(&str, &str)]) -> Option<u64> {
        let root = std::env::temp_dir().join(format!("cinch-memory-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let limit = limit_under(&root);
        // Never written where nothing was given.
        let _none = std::fs::remove_dir_all(&root);
        limit
    }

    #[test]
    fn groups_and_machine() {
        let machine = ("proc/meminfo", "MemTotal:       1024 kB\nMemFree: 12 kB\n");
        assert_eq!(limit("machine", &[machine]), Some(1 << 20));
        assert_eq!(limit("nothing", &[]), None);
        let v2 = ("proc/self/cgroup", "0::/a/b\n");
        let max = ("sys/fs/cgroup/a/b/memory.max", "max\n");
        assert_eq!(limit("max", &[machine, v2, max]), Some(1 << 20));
        let parent = ("sys/fs/cgroup/a/memory.max", "4096\n");
        assert_eq!(limit("parent", &[machine, v2, max, parent]), Some(4096));
        let v1 = ("proc/self/cgroup", "5:cpu:/x\n4:memory,hugetlb:/x\n");
        let mounted = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "8192\n");
        assert_eq!(limit("v1", &[machine, v1, mounted]), Some(8192));
        let unlimited = (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        assert_eq!(limit("unlimited", &[machine, v1, unlimited]), Some(1 << 20));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(limit_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
