//! What a sandbox's processes cost this host: memory, guest memory apart, and processor time, from `/proc`.

use std::fs::File;
use std::io::{self, BufReader};

/// Sums over a process's mappings, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Of its own mappings: pages that nobody else has.
    pub private: u64,
    /// Of its own mappings: pages that others have too, such as its program's.
    pub shared: u64,
    /// Of its own mappings: proportional set size.
    pub pss: u64,
    /// Guest memory that is in this host's memory.
    pub guest: u64,
    /// Of that what other processes share.
    pub guest_shared: u64,
    /// Images that the guest has as memory: pages of the host's page cache.
    pub images: u64,
}

/// Reads a process's footprint. The monitor excludes guest memory from core dumps, boot's and what came later alike, and
/// nothing else of it that has no name: so it is found. Of what has a name that is an image's file, which can only be read.
///
/// The kernel walks all its pages for this, some milliseconds for each GiB.
///
/// # Errors
/// When the process is gone or may not be looked at.
pub fn footprint(pid: u32) -> io::Result<Footprint> {
    sum(BufReader::with_capacity(4096, File::open(format!("/proc/{pid}/smaps"))?))
}

/// One mapping, as far as it was read.
#[derive(Debug, Default)]
struct Mapping {
    may_be_guests: bool,
    may_be_images: bool,
    private: u64,
    shared: u64,
    pss: u64,
    resident: u64,
}

fn sum(mut smaps: impl io::BufRead) -> io::Result<Footprint> {
    let mut sum = Footprint::default();
    let mut mapping = Mapping::default();
    let mut line = String::new();
    loop {
        line.clear();
        if smaps.read_line(&mut line)? == 0 {
            return Ok(sum);
        }
        let mut words = line.split_ascii_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        if !key.ends_with(':') {
            // `address perms offset device inode [name]`
            let name = line.split_ascii_whitespace().nth(5);
            let may_be_guests = name.is_none_or(|name| name == "/anon_hugepage");
            let may_be_images = name.is_some() && value == "r--p";
            mapping = Mapping { may_be_guests, may_be_images, ..Mapping::default() };
            continue;
        }
        let bytes = value.parse::<u64>().unwrap_or(0) * 1024;
        match key {
            // Pages of hugetlbfs are in no Rss.
            "Private_Hugetlb:" => {
                (mapping.private, mapping.resident) = (mapping.private + bytes, mapping.resident + bytes);
            }
            "Shared_Hugetlb:" => {
                (mapping.shared, mapping.resident) = (mapping.shared + bytes, mapping.resident + bytes);
            }
            "Private_Clean:" | "Private_Dirty:" => mapping.private += bytes,
            "Shared_Clean:" | "Shared_Dirty:" => mapping.shared += bytes,
            "Pss:" => mapping.pss += bytes,
            "Rss:" => mapping.resident += bytes,
            // The last line of each.
            "VmFlags:" => sum.add(&mapping, line.split_ascii_whitespace().any(|flag| flag == "dd")),
            _ => {}
        }
    }
}

impl Footprint {
    fn add(&mut self, mapping: &Mapping, is_kept_from_dumps: bool) {
        if mapping.may_be_guests && is_kept_from_dumps {
            self.guest += mapping.resident;
            self.guest_shared += mapping.shared;
        } else if mapping.may_be_images && is_kept_from_dumps {
            self.images += mapping.resident;
        } else {
            self.private += mapping.private;
            self.shared += mapping.shared;
            self.pss += mapping.pss;
        }
    }
}

/// Processor time that a process has used, microseconds.
///
/// # Errors
/// When the process is gone.
pub fn cpu_us(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    cpu_ticks(&stat)
        .map(|ticks| ticks.saturating_mul(1_000_000) / rustix::param::clock_ticks_per_second())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Fields 14 and 15 of `/proc/PID/stat`; the name, field 2, may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    Some(user + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_kept_apart() {
        let smaps = "00400000-00500000 r-xp 00000000 fe:00 1 /bin/x\nSize: 1024 kB\nRss: 100 kB\nPss: 50 kB\n\
                     Shared_Clean: 80 kB\nPrivate_Clean: 15 kB\nPrivate_Dirty: 5 kB\nVmFlags: rd ex dd\n\
                     7f0000000000-7f0007000000 rw-p 00000000 00:00 0\nSize: 114688 kB\nRss: 10000 kB\n\
                     Pss: 10000 kB\nShared_Clean: 0 kB\nShared_Dirty: 400 kB\nPrivate_Dirty: 9600 kB\nVmFlags: rd wr dd\n\
                     7f0007000000-7f0008000000 ---p 00000000 00:00 0 /anon_hugepage (deleted)\nSize: 16384 kB\nRss: 0 kB\n\
                     Private_Hugetlb: 10000 kB\nVmFlags: mr dd ht\n\
                     7ffd0000-7ffe0000 rw-p 0 00:00 0\nSize: 132 kB\nRss: 12 kB\nPss: 12 kB\n\
                     Private_Dirty: 12 kB\nVmFlags: rd wr\n\
                     7f8000000-7f9000000 r--p 0 fe:00 7 /cache/blobs/ab/0/data\nSize: 16384 kB\nRss: 300 kB\nPss: 30 kB\n\
                     Shared_Clean: 300 kB\nVmFlags: rd mr mw me dd\n";
        let kib = |n: u64| n * 1024;
        let expected = Footprint {
            private: kib(32),
            shared: kib(80),
            pss: kib(62),
            guest: kib(20000),
            guest_shared: kib(400),
            images: kib(300),
        };
        assert_eq!(sum(smaps.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn this_process_can_be_read() {
        let me = footprint(std::process::id()).unwrap();
        assert!(me.private > 4096 && me.pss >= me.private, "{me:?}");
        assert_eq!(cpu_ticks("1 (a) b) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0"), Some(42));
        assert_eq!(cpu_ticks("nonsense"), None);
        cpu_us(std::process::id()).unwrap();
    }
}
