//! Downloads and builds, kept outside the checkout and found again by the content that went into them.
//!
//! An entry is a folder `<kind>/<key>/`. It is made in a temporary folder under a file lock and renamed into place,
//! so an interrupted build leaves nothing that could be taken for an entry, and of two runs at once one builds while
//! the other waits. A manifest lists size, time and SHA-256 of every file. Sizes and times are compared at each use,
//! hashes when asked for ([`Cache::verify`]) or when a time differs; an entry that does not match is made anew.
//!
//! Nothing is ever evicted: `rm -r` of the whole folder is always safe while no command runs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Programs of a recipe's folder that look at what is made of it, and are not what it is made of.
const LOOK_ON: [&str; 2] = ["check", "effects"];

const MANIFEST: &str = ".manifest.json";

/// The cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
    verify: bool,
}

impl Cache {
    /// `$CTVM_CACHE`, else `ctvm` in the user's cache folder.
    pub fn open() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("CTVM_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|path| path.join("ctvm")))
            .or_else(|| variable("HOME").map(|path| path.join(".cache/ctvm")))
            .context("no CTVM_CACHE, XDG_CACHE_HOME or HOME to put the cache in")?;
        Self::at(&root)
    }

    /// A cache in the folder `root`, made if need be.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| format!("make the cache folder {}", root.display()))?;
        Ok(Self { root: root.canonicalize().context("resolve the cache folder")?, verify: false })
    }

    /// Compare hashes, not only sizes and times, from now on.
    pub fn verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// A folder of the cache that is not an entry: package lists, state of running labs.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }

    /// The entry `kind`/`key`. When it is missing or damaged, `make` fills an empty folder with it.
    pub fn entry(&self, kind: &str, key: &Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let folder = self.folder(kind)?;
        let name = key.name();
        let entry = folder.join(&name);
        if entry.exists() && self.is_whole(&entry) {
            return Ok(entry);
        }
        let _lock = lock(&folder.join(format!(".{name}.lock")))?;
        if entry.exists() {
            if self.is_whole(&entry) {
                return Ok(entry);
            }
            eprintln!("cache: {kind}/{name} is damaged, making it anew");
            remove(&entry)?;
        }
        clear_interrupted(&folder);
        let temporary = folder.join(format!(".{name}.part"));
        remove(&temporary)?; // left by an interrupted run; we hold the lock
        fs::create_dir(&temporary).with_context(|| format!("make {}", temporary.display()))?;
        if let Err(error) = make(&temporary) {
            remove(&temporary)?;
            return Err(error.context(format!("make {kind}/{name}")));
        }
        let manifest = Manifest::of(&temporary)?;
        let text = serde_json::to_vec(&manifest).context("write the manifest")?;
        fs::write(temporary.join(MANIFEST), text).context("write the manifest")?;
        fs::rename(&temporary, &entry).with_context(|| format!("put {} in place", entry.display()))?;
        Ok(entry)
    }

    fn is_whole(&self, entry: &Path) -> bool {
        let check = || -> Result<bool> {
            let manifest: Manifest = serde_json::from_slice(&fs::read(entry.join(MANIFEST))?)?;
            manifest.matches(entry, self.verify)
        };
        check().unwrap_or(false)
    }
}

/// What an entry is made from. Any difference in any part gives another key.
#[derive(Debug, Clone)]
pub struct Key {
    hash: Sha256,
}

impl Key {
    /// `recipe` names what is made; `version` rises when the code that makes it changes its outcome.
    pub fn new(recipe: &str, version: u32) -> Self {
        let mut hash = Sha256::new();
        put(&mut hash, recipe.as_bytes());
        put(&mut hash, &version.to_le_bytes());
        Self { hash }
    }

    /// Adds a text.
    pub fn text(mut self, text: &str) -> Self {
        put(&mut self.hash, text.as_bytes());
        self
    }

    /// Adds the content of a file, not its name.
    pub fn file(mut self, path: &Path) -> Result<Self> {
        put(&mut self.hash, hash_file(path)?.as_bytes());
        Ok(self)
    }

    /// Adds names, permissions and contents of all files below a folder, apart from those that are about it: pages of
    /// documentation, and programs that [`LOOK_ON`].
    pub fn folder(mut self, path: &Path) -> Result<Self> {
        let mut found = walk(path)?;
        found.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, path, metadata) in found {
            let program = name.rsplit('/').next().unwrap_or(&name);
            if name.ends_with(".md") || name.contains("__pycache__/") || LOOK_ON.contains(&program) {
                continue;
            }
            put(&mut self.hash, name.as_bytes());
            put(&mut self.hash, &(metadata.mode() & 0o111).to_le_bytes());
            let content = if metadata.is_symlink() {
                fs::read_link(&path)?.to_string_lossy().into_owned()
            } else {
                hash_file(&path)?
            };
            put(&mut self.hash, content.as_bytes());
        }
        Ok(self)
    }

    /// As a folder name.
    pub fn name(&self) -> String {
        let mut name = hex(&self.hash.clone().finalize());
        name.truncate(32);
        name
    }
}

/// Length first, so that two parts never run into each other.
fn put(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// Every file and link of an entry, by path.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    items: BTreeMap<String, Item>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Item {
    size: u64,
    /// Modification time in nanoseconds since 1970.
    time_ns: i128,
    /// SHA-256 of a file, target of a symbolic link.
    content: String,
}

impl Manifest {
    fn of(root: &Path) -> Result<Self> {
        let mut items = BTreeMap::new();
        for (name, path, metadata) in walk(root)? {
            let content = if metadata.is_symlink() {
                fs::read_link(&path)?.to_string_lossy().into_owned()
            } else {
                hash_file(&path)?
            };
            items.insert(name, Item { size: metadata.size(), time_ns: time_ns(&metadata), content });
        }
        Ok(Self { items })
    }

    fn matches(&self, root: &Path, hashes: bool) -> Result<bool> {
        let mut seen = 0;
        for (name, path, metadata) in walk(root)? {
            if name == MANIFEST {
                continue;
            }
            let Some(item) = self.items.get(&name) else { return Ok(false) };
            if item.size != metadata.size() {
                return Ok(false);
            }
            if metadata.is_symlink() {
                if fs::read_link(&path)?.to_string_lossy() != item.content {
                    return Ok(false);
                }
            } else if (hashes || item.time_ns != time_ns(&metadata)) && hash_file(&path)? != item.content {
                return Ok(false);
            }
            seen += 1;
        }
        Ok(seen == self.items.len())
    }
}

fn time_ns(metadata: &fs::Metadata) -> i128 {
    i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec())
}

/// All files and links below `root`: name from there, path, metadata of the thing itself.
fn walk(root: &Path) -> Result<Vec<(String, PathBuf, fs::Metadata)>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let list = fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))?;
        for item in list {
            let path = item?.path();
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.is_file() || metadata.is_symlink() {
                let name = path.strip_prefix(root).expect("the walk stays below its root");
                found.push((name.to_string_lossy().into_owned(), path.clone(), metadata));
            }
        }
    }
    Ok(found)
}

/// SHA-256 of a file, in hexadecimal.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(|| format!("read {}", path.display()))? {
            0 => return Ok(hex(&hash.finalize())),
            length => hash.update(&buffer[..length]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Waits for, then holds, the exclusive lock of the file `path` until the result is dropped.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            eprintln!("cache: waiting for another run ({})", path.display());
        }
        Err(error) => bail!("lock {}: {error}", path.display()),
    }
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

/// Removes what interrupted runs left of entries that nobody is making now. Their keys may never be asked for again.
fn clear_interrupted(folder: &Path) {
    for item in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = item.file_name().to_string_lossy().into_owned();
        let Some(entry) = name.strip_suffix(".part") else { continue };
        let Ok(file) = File::options().create(true).append(true).open(folder.join(format!("{entry}.lock")))
        else {
            continue;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(item.path()); // another run may be removing it too
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn cache() -> (tempfile::TempDir, Cache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path()).unwrap();
        (folder, cache)
    }

    fn key(text: &str) -> Key {
        Key::new("test", 1).text(text)
    }

    fn fill(folder: &Path) -> Result<()> {
        fs::create_dir(folder.join("sub"))?;
        fs::write(folder.join("sub/a"), "content")?;
        std::os::unix::fs::symlink("sub/a", folder.join("link"))?;
        Ok(())
    }

    #[test]
    fn second_use_makes_nothing() {
        let (_folder, cache) = cache();
        let entry = cache.entry("kind", &key("a"), fill).unwrap();
        let again = cache.entry("kind", &key("a"), |_| panic!("made twice")).unwrap();
        assert_eq!(entry, again);
        assert_eq!(fs::read_to_string(again.join("link")).unwrap(), "content");
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        assert_ne!(key("ab").text("c").name(), key("a").text("bc").name());
        assert_ne!(Key::new("test", 1).name(), Key::new("test", 2).name());
    }

    #[test]
    fn folder_key_follows_names_and_contents_but_not_pages() {
        let folder = tempfile::tempdir().unwrap();
        let name = || Key::new("test", 1).folder(folder.path()).unwrap().name();
        fs::write(folder.path().join("a"), "1").unwrap();
        let first = name();
        fs::create_dir(folder.path().join("sub")).unwrap();
        for about in ["README.md", "check", "sub/check", "effects"] {
            fs::write(folder.path().join(about), "text").unwrap();
            assert_eq!(first, name(), "{about}");
        }
        fs::write(folder.path().join("a"), "2").unwrap();
        let second = name();
        assert_ne!(first, second);
        fs::rename(folder.path().join("a"), folder.path().join("b")).unwrap();
        assert_ne!(second, name());
    }

    #[test]
    fn interrupted_build_leaves_no_entry_and_no_rest() {
        let (folder, cache) = cache();
        let name = key("a").name();
        // What a killed run leaves: a part with files in it, and no entry.
        fs::create_dir_all(folder.path().join(format!("kind/.{name}.part/sub"))).unwrap();
        fs::write(folder.path().join(format!("kind/.{name}.part/sub/half")), "ha").unwrap();
        let entry = cache.entry("kind", &key("a"), fill).unwrap();
        assert!(!entry.join("sub/half").exists());
        assert!(entry.join("sub/a").exists());
    }

    #[test]
    fn rest_of_another_interrupted_build_goes_unless_it_still_runs() {
        let (folder, cache) = cache();
        for name in ["dead", "alive"] {
            fs::create_dir_all(folder.path().join(format!("kind/.{name}.part/sub"))).unwrap();
        }
        let _held = lock(&folder.path().join("kind/.alive.lock")).unwrap();
        cache.entry("kind", &key("a"), fill).unwrap();
        assert!(!folder.path().join("kind/.dead.part").exists());
        assert!(folder.path().join("kind/.alive.part").exists());
    }

    #[test]
    fn failed_build_is_tried_again() {
        let (_folder, cache) = cache();
        assert!(cache.entry("kind", &key("a"), |_| bail!("no network")).is_err());
        assert!(cache.entry("kind", &key("a"), fill).unwrap().join("sub/a").exists());
    }

    #[test]
    fn damage_is_noticed() {
        let damages: [fn(&Path); 5] = [
            |entry| fs::write(entry.join("sub/a"), "short").unwrap(),
            |entry| fs::write(entry.join("sub/a"), "CONTENT").unwrap(), // same size, another time
            |entry| fs::remove_file(entry.join("link")).unwrap(),
            |entry| fs::write(entry.join("more"), "").unwrap(),
            |entry| fs::write(entry.join(MANIFEST), "{").unwrap(),
        ];
        for damage in damages {
            let (_folder, cache) = cache();
            damage(&cache.entry("kind", &key("a"), fill).unwrap());
            let made = AtomicU32::new(0);
            let entry = cache.entry("kind", &key("a"), |folder| {
                made.fetch_add(1, Ordering::Relaxed);
                fill(folder)
            });
            assert_eq!(made.load(Ordering::Relaxed), 1);
            assert_eq!(fs::read_to_string(entry.unwrap().join("sub/a")).unwrap(), "content");
        }
    }

    #[test]
    fn damage_behind_the_clock_is_noticed_when_asked() {
        let (_folder, cache) = cache();
        let entry = cache.entry("kind", &key("a"), fill).unwrap();
        let file = entry.join("sub/a");
        let time = fs::metadata(&file).unwrap().modified().unwrap();
        fs::write(&file, "CONTENT").unwrap();
        File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
        cache.entry("kind", &key("a"), |_| panic!("sizes and times agree")).unwrap();
        let entry = cache.verify(true).entry("kind", &key("a"), fill).unwrap();
        assert_eq!(fs::read_to_string(entry.join("sub/a")).unwrap(), "content");
    }

    #[test]
    fn two_writers_at_once_make_it_once() {
        let (_folder, cache) = cache();
        let (made, start) = (AtomicU32::new(0), Barrier::new(4));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    let entry = cache.entry("kind", &key("a"), |folder| {
                        made.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(50)); // lets the others reach the lock
                        fill(folder)
                    });
                    assert!(entry.unwrap().join("sub/a").exists());
                });
            }
        });
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }
}
