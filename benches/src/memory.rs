//! Memory of a VMM process, guest memory apart.

use std::fs;

use anyhow::{Context, Result};

/// Sums over a process' mappings, KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Proportional set size of all but guest memory.
    pub own_pss: u64,
    /// Of it anonymous: what a second VM of the same kind adds.
    pub own_anonymous: u64,
    /// Resident guest memory.
    pub guest_rss: u64,
    /// Resident of files that are guest memory, too: the host's page cache.
    pub shown_rss: u64,
}

/// Reads a process' footprint. A mapping of at least `guest_kib` is guest memory; 0: it has none.
pub fn footprint(pid: u32, guest_kib: u64) -> Result<Footprint> {
    let smaps =
        fs::read_to_string(format!("/proc/{pid}/smaps")).with_context(|| format!("smaps of {pid}"))?;
    Ok(parse(&smaps, guest_kib))
}

fn parse(smaps: &str, guest_kib: u64) -> Footprint {
    let mut sum = Footprint::default();
    let (mut is_guest, mut is_shown) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        if !key.ends_with(':') {
            // `address perms offset device inode [name]`: a cache file, or a bootstrap.
            let name = line.split_whitespace().nth(5).unwrap_or_default();
            is_shown = ["/data", "/image.boot"].iter().any(|end| name.ends_with(end));
        }
        let kib = value.parse::<u64>().unwrap_or(0);
        match key {
            "Size:" => is_guest = guest_kib > 0 && kib >= guest_kib,
            "Rss:" if is_shown => sum.shown_rss += kib,
            _ if is_shown => {}
            "Rss:" if is_guest => sum.guest_rss += kib,
            "Pss:" if !is_guest => sum.own_pss += kib,
            "Anonymous:" if !is_guest => sum.own_anonymous += kib,
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_kept_apart() {
        let smaps = "00400000-00500000 r-xp 00000000 fe:00 1 /bin/x\nSize: 1024 kB\nRss: 100 kB\nPss: 50 kB\n\
                     Anonymous: 0 kB\n7f0000000000-7f0008000000 rw-p 00000000 00:00 0\nSize: 131072 kB\n\
                     Rss: 20000 kB\nPss: 20000 kB\nAnonymous: 20000 kB\n7ffd0000-7ffe0000 rw-p 0 00:00 0 [stack]\n\
                     Size: 132 kB\nRss: 12 kB\nPss: 12 kB\nAnonymous: 12 kB\n\
                     7f1000000-7f2000000 r--p 0 fe:00 9 /c/cache/blobs/ab/0/data\nSize: 200000 kB\nRss: 64 kB\nPss: 7 kB\n\
                     Anonymous: 0 kB\n";
        let sum = parse(smaps, 128 * 1024);
        assert_eq!(sum, Footprint { own_pss: 62, own_anonymous: 12, guest_rss: 20000, shown_rss: 64 });
        assert_eq!(parse(smaps, 0).guest_rss, 0);
    }
}
