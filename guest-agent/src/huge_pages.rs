//! Huge pages of containers: the guest's pool grows by a container's limits when it is made and shrinks when it goes, and a
//! hugetlbfs that containers share is mounted once.
//!
//! The pool is the guest's: a container may use what another left of it. All of it is memory of the VM.

use std::io;
use std::path::{Path, PathBuf};

use agent_api::{HUGE_PAGES, HUGE_PAGES_PATH};
use oci_spec::runtime::{LinuxHugepageLimit, Spec};

use crate::mounts::{self, MountError};

/// Where the kernel has a pool for each size of pages.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Huge pages that a container cannot have.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The kernel was built without.
    #[error("{what}: the guest's kernel has no huge pages (CONFIG_HUGETLBFS)")]
    Kernel {
        /// What was asked for.
        what: String,
    },
    /// The processor has no pages of that size.
    #[error("huge pages of {size}: the guest has those of {has} KiB")]
    Size {
        /// As it was asked for.
        size: String,
        /// Sizes in KiB.
        has: String,
    },
    /// Not a size or not a number of pages.
    #[error(
        "limit of {bytes} bytes for huge pages of {size:?}: must be a multiple of a size such as 2MB or 1GB"
    )]
    Limit {
        /// As it was asked for.
        size: String,
        /// As it was asked for.
        bytes: i64,
    },
    /// A volume's name that is not one.
    #[error("{source_name:?} is not a name for huge pages")]
    Volume {
        /// As it was asked for.
        source_name: String,
    },
    /// The guest has not the memory.
    #[error(
        "{wanted} huge pages of {size}: the guest has memory for {got} in one piece; they are a part of the VM's memory"
    )]
    Memory {
        /// How many were asked for.
        wanted: u64,
        /// How many the kernel found.
        got: u64,
        /// As it was asked for.
        size: String,
    },
    /// The kernel's files.
    #[error("huge pages: {file}")]
    Io {
        /// Which.
        file: PathBuf,
        /// What happened.
        #[source]
        cause: io::Error,
    },
}

/// Pages that the pool has for a container. They are given back with this.
#[derive(Debug, Default)]
pub struct Reserved(Vec<(Pool, u64)>);

impl Drop for Reserved {
    fn drop(&mut self) {
        for (pool, pages) in &self.0 {
            let left = pool.size().map(|size| size.saturating_sub(*pages));
            // Pages in use stay until their last user goes, and are surplus then.
            if let Err(error) = left.and_then(|left| pool.set_size(left)) {
                log::warn!("{} huge pages stay in {}: {error}", pages, pool.0.display());
            }
        }
    }
}

/// The file of a size's pool.
#[derive(Debug, Clone)]
struct Pool(PathBuf);

impl Pool {
    fn size(&self) -> Result<u64, HugePagesError> {
        let text = std::fs::read_to_string(&self.0).map_err(|cause| self.error(cause))?;
        text.trim().parse().map_err(|_| self.error(io::ErrorKind::InvalidData.into()))
    }

    fn set_size(&self, pages: u64) -> Result<(), HugePagesError> {
        std::fs::write(&self.0, pages.to_string()).map_err(|cause| self.error(cause))
    }

    fn error(&self, cause: io::Error) -> HugePagesError {
        HugePagesError::Io { file: self.0.clone(), cause }
    }
}

/// Reserves what the limits of `spec` say, and makes its shared mounts. Both are taken out: the guest's control groups do
/// not count huge pages.
pub fn set_up(spec: &mut Spec) -> Result<Reserved, crate::errors::TaskError> {
    let reserved = reserve(Path::new(POOLS), spec)?;
    share(spec)?;
    Ok(reserved)
}

fn reserve(pools: &Path, spec: &mut Spec) -> Result<Reserved, HugePagesError> {
    let mut reserved = Reserved::default();
    let Some(mut linux) = spec.linux().clone() else { return Ok(reserved) };
    let Some(mut resources) = linux.resources().clone() else { return Ok(reserved) };
    let limits = resources.hugepage_limits().clone().unwrap_or_default();
    for limit in limits.iter().filter(|limit| limit.limit() != 0) {
        let size = limit.page_size().clone();
        let (kib, wanted) = pages(limit)?;
        let pool = pool(pools, &size, kib)?;
        let before = pool.size()?;
        pool.set_size(before + wanted)?;
        let got = pool.size()?.saturating_sub(before);
        // Given back with the rest if it is not enough.
        reserved.0.push((pool, got));
        if got < wanted {
            return Err(HugePagesError::Memory { wanted, got, size });
        }
    }
    resources.set_hugepage_limits(None);
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    Ok(reserved)
}

/// Size of a page in KiB, and how many of them.
fn pages(limit: &LinuxHugepageLimit) -> Result<(u64, u64), HugePagesError> {
    let wrong = || HugePagesError::Limit { size: limit.page_size().clone(), bytes: limit.limit() };
    let number = limit.page_size().strip_suffix('B').ok_or_else(wrong)?;
    let units = [('K', 1), ('M', 1 << 10), ('G', 1 << 20)];
    let unit = units.iter().find_map(|(unit, kib)| Some((number.strip_suffix(*unit)?, *kib)));
    let (number, unit): (&str, u64) = unit.ok_or_else(wrong)?;
    let kib = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(wrong)?;
    let bytes = u64::try_from(limit.limit()).map_err(|_| wrong())?;
    let page = kib.checked_mul(1 << 10).filter(|page| *page > 0).ok_or_else(wrong)?;
    if bytes.is_multiple_of(page) { Ok((kib, bytes / page)) } else { Err(wrong()) }
}

fn pool(pools: &Path, size: &str, kib: u64) -> Result<Pool, HugePagesError> {
    let pool = pools.join(format!("hugepages-{kib}kB/nr_hugepages"));
    if pool.exists() {
        return Ok(Pool(pool));
    }
    let Ok(entries) = std::fs::read_dir(pools) else {
        return Err(HugePagesError::Kernel { what: format!("huge pages of {size}") });
    };
    let name = |entry: std::fs::DirEntry| entry.file_name().into_string().ok();
    let sizes = entries.flatten().filter_map(name);
    let sizes =
        sizes.filter_map(|name| Some(name.strip_prefix("hugepages-")?.strip_suffix("kB")?.to_owned()));
    let has = sizes.collect::<Vec<_>>().join(", ");
    Err(HugePagesError::Size { size: size.to_owned(), has })
}

/// Turns mounts of shared huge pages into binds of them, which are made when first asked for.
fn share(spec: &mut Spec) -> Result<(), crate::errors::TaskError> {
    let Some(mut mounts) = spec.mounts().clone() else { return Ok(()) };
    for mount in mounts.iter_mut().filter(|mount| mount.typ().as_deref() == Some("hugetlbfs")) {
        let at = mount.destination().display().to_string();
        if !Path::new(POOLS).exists() {
            return Err(HugePagesError::Kernel { what: format!("volume of huge pages at {at:?}") }.into());
        }
        let source = mount.source().as_ref().map(|source| source.to_string_lossy().into_owned());
        let Some(name) = source.as_deref().and_then(|source| source.strip_prefix(HUGE_PAGES)) else {
            continue;
        };
        let options = mount.options().clone().unwrap_or_default();
        let (own, theirs): (Vec<String>, Vec<String>) =
            options.into_iter().partition(|option| option.starts_with("pagesize="));
        let path = volume(name)?;
        if !mounts::is_mount_point(&path) {
            make(&path, &own)?;
        }
        mount.set_typ(Some("bind".to_owned())).set_source(Some(path));
        mount.set_options(Some(["rbind".to_owned()].into_iter().chain(theirs).collect()));
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn make(path: &Path, options: &[String]) -> Result<(), MountError> {
    mounts::make("hugetlbfs", path, "hugetlbfs", options)
}

fn volume(name: &str) -> Result<PathBuf, HugePagesError> {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || !name.chars().all(letter) {
        return Err(HugePagesError::Volume { source_name: name.to_owned() });
    }
    Ok(Path::new(HUGE_PAGES_PATH).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(limits: &str) -> Spec {
        let text =
            format!(r#"{{"ociVersion":"1.1.0","linux":{{"resources":{{"hugepageLimits":{limits}}}}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    /// The kernel's files, with a pool of pages of 2 MiB.
    fn pools() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB");
        std::fs::create_dir(&pool).unwrap();
        std::fs::write(pool.join("nr_hugepages"), "3\n").unwrap();
        (dir, pool.join("nr_hugepages"))
    }

    #[test]
    fn the_pool_grows_by_a_containers_limit_and_shrinks_with_it() {
        let (dir, pool) = pools();
        let size = || std::fs::read_to_string(&pool).unwrap();
        let mut spec = limited(r#"[{"pageSize":"2MB","limit":8388608},{"pageSize":"1GB","limit":0}]"#);
        let reserved = reserve(dir.path(), &mut spec).unwrap();
        assert_eq!(size(), "7");
        assert!(spec.linux().as_ref().unwrap().resources().as_ref().unwrap().hugepage_limits().is_none());
        drop(reserved);
        assert_eq!(size(), "3");
    }

    #[test]
    fn what_the_guest_cannot_give_is_refused_with_its_value() {
        let (dir, pool) = pools();
        let error = |limits: &str| reserve(dir.path(), &mut limited(limits)).unwrap_err().to_string();
        let text = error(r#"[{"pageSize":"1GB","limit":1073741824}]"#);
        assert_eq!(text, "huge pages of 1GB: the guest has those of 2048 KiB");
        for wrong in [
            r#"{"pageSize":"2MB","limit":1000}"#,
            r#"{"pageSize":"2M","limit":2097152}"#,
            r#"{"pageSize":"2MB","limit":-2097152}"#,
            r#"{"pageSize":"0MB","limit":4096}"#,
        ] {
            assert!(error(&format!("[{wrong}]")).contains("must be a multiple"), "{wrong}");
        }
        // What was reserved for another size is given back.
        error(r#"[{"pageSize":"2MB","limit":2097152},{"pageSize":"1GB","limit":1073741824}]"#);
        assert_eq!(std::fs::read_to_string(&pool).unwrap(), "3");
        let without =
            reserve(Path::new("/nonexistent"), &mut limited(r#"[{"pageSize":"2MB","limit":4194304}]"#));
        let text = without.unwrap_err().to_string();
        assert_eq!(text, "huge pages of 2MB: the guest's kernel has no huge pages (CONFIG_HUGETLBFS)");
    }

    #[test]
    fn volumes_have_names_of_files() {
        assert_eq!(volume("2a-7").unwrap(), Path::new("/run/ctvm/huge/2a-7"));
        for wrong in ["", "..", "a/b", "."] {
            assert!(matches!(volume(wrong), Err(HugePagesError::Volume { .. })), "{wrong}");
        }
    }
}
