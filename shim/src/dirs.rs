//! Directories that hold one directory for each of several processes. The first to come makes one, and whoever finds it
//! empty on leaving removes it, so it may go between being made and being used.

use std::io;
use std::path::Path;

/// How often the shared directory may vanish under us: each time another process has left it in that moment.
const MOST_TRIES: u32 = 100;

/// Makes `dir`, and what of the directories above it is missing.
///
/// # Errors
/// Those of mkdir(2). `NotFound` only when the directory above was removed a hundred times meanwhile.
pub fn make(dir: &Path) -> io::Result<()> {
    for _ in 1..MOST_TRIES {
        match std::fs::create_dir_all(dir) {
            // The second: another made it before us, and removed it before we looked whether it is a directory.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {}
            made => return made,
        }
    }
    std::fs::create_dir_all(dir)
}

/// Removes the directory above `dir` when nothing is left in it.
pub fn leave_parent(dir: &Path) {
    if let Some(parent) = dir.parent() {
        // Fails while others are in it, as it should.
        let _ = std::fs::remove_dir(parent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_comes_while_others_leave() {
        let root = tempfile::tempdir().unwrap();
        let shared = root.path().join("k8s.io");
        let rounds = |name: &str| {
            let own = shared.join(name);
            for _ in 0..2000 {
                make(&own).unwrap();
                std::fs::remove_dir(&own).unwrap();
                leave_parent(&own);
            }
        };
        std::thread::scope(|scope| {
            for name in ["a", "b", "c"] {
                scope.spawn(move || rounds(name));
            }
        });
        assert!(!shared.exists());
    }

    #[test]
    fn what_cannot_be_made_is_said_at_once() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(make(&file.join("x")).unwrap_err().kind(), io::ErrorKind::NotADirectory);
        leave_parent(Path::new("/"));
    }
}
