//! Debian packages without the host's package system: lists, dependency resolution and downloads with a private
//! state folder, so that suites the host does not use are reachable and its configuration stays as it is.
//!
//! The mirror is the one the host is configured for. Nothing is installed: packages are unpacked (`tree.rs`) and
//! no maintainer script ever runs. Resolution starts from an empty system, so a closure is complete by itself.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::cache::{Cache, Key, hash_file, lock};
use crate::steps::{output, quietly, step};

/// Package lists older than this are fetched again. Within it, the same packages are used even offline.
const LISTS_STAY_GOOD: Duration = Duration::from_secs(30 * 24 * 3600);

/// Settings of this machine's apt that say how to reach a mirror, not what to fetch from it.
const TRANSPORT: [&str; 4] = ["Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"];

/// Where Debian installs its archive keys.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A set of Debian suites to resolve in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    Bookworm,
    Trixie,
    Forky,
}

impl Suite {
    const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Forky];

    fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Forky => "forky",
        }
    }
}

/// One package of a closure, or a source, as the mirror has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// File name: `name_version_arch.deb`, or `name_version.orig.tar.xz`.
    pub file: String,
    pub sha256: String,
}

impl Package {
    pub fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or(&self.file)
    }
}

/// apt with a state folder of our own.
#[derive(Debug)]
pub struct Apt<'a> {
    cache: &'a Cache,
    root: PathBuf,
}

impl<'a> Apt<'a> {
    /// Sets the state folder up; fetches lists when there are none or they are old.
    pub fn open(cache: &'a Cache) -> Result<Self> {
        let apt = Self { cache, root: cache.folder("apt")? };
        let _lock = lock(&apt.root.join(".lock"))?;
        if let Err(error) = apt.refresh_if_older_than(LISTS_STAY_GOOD) {
            if !apt.stamp().exists() {
                return Err(error);
            }
            eprintln!("apt: going on with the old package lists: {error:#}");
        }
        Ok(apt)
    }

    /// `packages` and all they depend on, without recommendations.
    pub fn resolve(&self, suite: Suite, packages: &[&str]) -> Result<Vec<Package>> {
        let stamp = fs::read_to_string(self.stamp()).context("read the package lists' stamp")?;
        let key = Key::new("resolve", 1).text(suite.name()).text(&packages.join(" ")).text(&stamp);
        let entry = self.cache.entry("resolved", &key, |folder| {
            let text =
                output(self.apt_get(suite).args(["--print-uris", "-qq", "-y", "install"]).args(packages))?;
            let found = text.lines().map(parse_uri_line).collect::<Result<Vec<_>>>()?;
            fs::write(folder.join("packages.json"), serde_json::to_vec(&found)?)
                .context("write the package list")
        })?;
        let text = fs::read(entry.join("packages.json")).context("read the package list")?;
        serde_json::from_slice(&text).context("read the package list")
    }

    /// Paths of the packages' files, downloaded if need be. `request` is what `packages` was resolved from.
    pub fn fetch(&self, suite: Suite, request: &[&str], packages: &[Package]) -> Result<Vec<PathBuf>> {
        let archives = self.root.join("archives").join(suite.name());
        let downloaded = Cell::new(false);
        packages
            .iter()
            .map(|package| {
                let entry = self.cache.entry("deb", &deb_key(package), |folder| {
                    if !downloaded.replace(true) {
                        self.download(suite, request, packages, &archives)?;
                    }
                    let (from, to) = (archives.join(&package.file), folder.join(&package.file));
                    fs::rename(&from, &to).with_context(|| format!("take {}", from.display()))?;
                    let found = hash_file(&to)?;
                    ensure!(
                        found == package.sha256,
                        "{} has SHA-256 {found}, not {}",
                        package.file,
                        package.sha256
                    );
                    Ok(())
                })?;
                Ok(entry.join(&package.file))
            })
            .collect()
    }

    /// The upstream archive of a source package.
    pub fn resolve_source(&self, suite: Suite, name: &str) -> Result<Package> {
        let text = output(self.apt_get(suite).args(["--print-uris", "-qq", "--tar-only", "source", name]))?;
        parse_uri_line(text.lines().next().unwrap_or_default())
            .with_context(|| format!("look up the source of {name} in {}", suite.name()))
    }

    /// Path of the archive that [`Apt::resolve_source`] found, downloaded if need be.
    pub fn fetch_source(&self, suite: Suite, name: &str, source: &Package) -> Result<PathBuf> {
        let entry = self.cache.entry("source", &deb_key(source), |folder| {
            let mut command = self.apt_get(suite);
            command.current_dir(folder).args(["-qq", "--tar-only", "--download-only", "source", name]);
            step(&format!("download the source of {name}"), || {
                quietly(self.cache, "download", &mut command).context(Download)
            })?;
            let found = hash_file(&folder.join(&source.file))?;
            ensure!(found == source.sha256, "{} has SHA-256 {found}, not {}", source.file, source.sha256);
            Ok(())
        })?;
        Ok(entry.join(&source.file))
    }

    /// Does `work`; when it fails, maybe because the mirror moved on, once more with fresh lists.
    pub fn with_fresh_lists_if_needed<T>(&self, work: impl Fn() -> Result<T>) -> Result<T> {
        let first = match work() {
            Ok(done) => return Ok(done),
            Err(error) if error.is::<Download>() => error,
            Err(error) => return Err(error),
        };
        eprintln!("apt: {first:#}; trying once more with fresh package lists");
        {
            let _lock = lock(&self.root.join(".lock"))?;
            self.refresh_if_older_than(Duration::ZERO)?;
        }
        work()
    }

    fn download(&self, suite: Suite, request: &[&str], packages: &[Package], archives: &Path) -> Result<()> {
        let _lock = lock(&self.root.join(".lock"))?;
        let _ = fs::remove_dir_all(archives); // leftovers of an interrupted run
        fs::create_dir_all(archives.join("partial")).context("make the archives folder")?;
        for package in packages {
            // What an earlier closure brought need not come again; apt checks its hash.
            let have = self.cache.folder("deb")?.join(deb_key(package).name()).join(&package.file);
            let _ = fs::hard_link(have, archives.join(&package.file)); // mostly it is not there
        }
        let mut command = self.apt_get(suite);
        command.arg("-o").arg(format!("Dir::Cache::archives={}", archives.display()));
        command.args(["-qq", "-y", "--download-only", "install"]).args(request);
        step(&format!("download {} packages from {}", packages.len(), suite.name()), || {
            quietly(self.cache, "download", &mut command).context(Download)
        })
    }

    /// `apt-get` that sees our folders only, with the host's settings for transport (proxies and the like).
    fn apt_get(&self, suite: Suite) -> Command {
        let mut command = Command::new("apt-get");
        let root = self.root.display();
        let sources = format!("Dir::Etc::sourcelist={root}/{}.list", suite.name());
        let cache = format!("Dir::Cache={root}/cache-{}", suite.name());
        command.env("APT_CONFIG", self.root.join("apt.conf")).env("LC_ALL", "C");
        for option in [&sources, &cache] {
            command.arg("-o").arg(option);
        }
        command.args(["-t", suite.name(), "--no-install-recommends"]);
        command
    }

    fn refresh_if_older_than(&self, age: Duration) -> Result<()> {
        let fresh = fs::metadata(self.stamp())
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| SystemTime::now().duration_since(time).is_ok_and(|passed| passed < age));
        if fresh {
            return Ok(());
        }
        step("fetch package lists", || {
            self.configure()?;
            for suite in Suite::ALL {
                quietly(self.cache, "apt-update", self.apt_get(suite).arg("update"))?;
            }
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("read the clock")?;
            fs::write(self.stamp(), now.as_nanos().to_string()).context("write the package lists' stamp")
        })
    }

    fn configure(&self) -> Result<()> {
        let root = self.root.display();
        let mirror = mirror()?;
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        for suite in Suite::ALL {
            let name = suite.name();
            let lines = format!("deb {signed}{mirror} {name} main\ndeb-src {signed}{mirror} {name} main\n");
            fs::write(self.root.join(format!("{}.list", suite.name())), lines)
                .context("write a sources list")?;
            fs::create_dir_all(self.root.join(format!("cache-{}/archives/partial", suite.name())))?;
        }
        fs::create_dir_all(self.root.join("state/lists/partial")).context("make the state folder")?;
        fs::write(self.root.join("state/status"), "").context("write an empty package status")?;
        let host = output(Command::new("apt-config").arg("dump"))?;
        let transport: String = host
            .lines()
            .filter(|line| TRANSPORT.iter().any(|name| line.starts_with(name)))
            .map(|line| format!("{line}\n"))
            .collect();
        // No list clean-up: the suites share the lists' folder, and each update would remove those of the others.
        let own = format!(
            "Dir::Etc::sourceparts \"/dev/null\";\nDir::Etc::parts \"/dev/null\";\nDir::Etc::main \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::State \"{root}/state\";\nDir::State::status \"{root}/state/status\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\nAPT::Sandbox::User \"\";\n\
             APT::Get::List-Cleanup \"false\";\nAcquire::Languages \"none\";\nAcquire::ForceHash \"sha256\";\n\
             Acquire::Retries \"3\";\nDebug::NoLocking \"true\";\n"
        );
        fs::write(self.root.join("apt.conf"), transport + &own).context("write apt.conf")
    }

    fn stamp(&self) -> PathBuf {
        // Named by what was fetched: a suite more makes lists without it old.
        self.root.join(format!("fetched-{}", Suite::ALL.map(Suite::name).join("-")))
    }
}

/// Marks an error as one that fresh package lists may cure.
#[derive(Debug, Clone, Copy)]
struct Download;

impl std::fmt::Display for Download {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("download packages")
    }
}

fn deb_key(package: &Package) -> Key {
    Key::new("deb", 1).text(&package.file).text(&package.sha256)
}

/// The Debian mirror that this machine is configured for.
fn mirror() -> Result<String> {
    let format = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)";
    let text =
        output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))
            .context("ask apt for its sources (this needs a Debian machine)")?;
    let main: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_suffix("|main")?.split_once('|'))
        .filter(|(_, release)| !release.contains("security"))
        .collect();
    let names = ["bookworm", "stable", "oldstable", "trixie", "forky", "testing", "sid"];
    names
        .iter()
        .find_map(|name| main.iter().find(|(_, release)| release == name))
        .map(|(uri, _)| (*uri).to_string())
        .context("no Debian suite with the component `main` in apt's sources")
}

/// `'URI' FILE SIZE SHA256:HASH`, what `--print-uris` prints for a package.
fn parse_uri_line(line: &str) -> Result<Package> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, file, _, hash] = words[..] else { bail!("apt printed {line:?} where a package was expected") };
    let sha256 = hash.strip_prefix("SHA256:").with_context(|| format!("apt gave no SHA-256 for {file}"))?;
    Ok(Package { file: file.to_string(), sha256: sha256.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_line_is_read() {
        let line = "'http://mirror/pool/main/g/glibc/libc6_2.41-12%2bdeb13u5_amd64.deb' libc6_2.41-12+deb13u5_amd64.deb 2850108 SHA256:b59b";
        let package = parse_uri_line(line).unwrap();
        assert_eq!((package.name(), package.sha256.as_str()), ("libc6", "b59b"));
    }

    #[test]
    fn other_hashes_and_other_lines_are_refused() {
        assert!(parse_uri_line("'http://mirror/a.deb' a.deb 1 MD5Sum:00").is_err());
        assert!(parse_uri_line("E: Unable to locate package x").is_err());
    }
}
