//! Killing what a pod stands on: its shim, its VMM, the agent in its guest.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use e2e::containerd::kill_9;
use k8s_cri::v1::PodSandboxConfig;
use serde_json::Value;

use crate::pod::security;
use crate::{Cri, Pod};

/// Where the shim keeps a pod's state.
pub fn state_folder(pod: &str) -> PathBuf {
    PathBuf::from("/run/ctvm/k8s.io").join(pod)
}

/// Ids of the pods that have state.
pub fn pods_with_state() -> Vec<String> {
    let entries = fs::read_dir("/run/ctvm/k8s.io").into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// Process number of a pod's `shim` or `vmm`, once there is one.
pub fn pid(pod: &str, of: &str) -> Option<i32> {
    let text = fs::read_to_string(state_folder(pod).join("state.json")).ok()?;
    let state: Value = text.parse().ok()?;
    i32::try_from(state[of]["pid"].as_i64()?).ok()
}

/// `kill -9` for a pod's `shim` or `vmm`.
pub fn kill(pod: &str, of: &str) -> Result<()> {
    kill_9(pid(pod, of).with_context(|| format!("pod {pod} has no {of}"))?)
}

/// Lets a pod have privileged containers.
pub fn privileged(config: &mut PodSandboxConfig) {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
}

/// A privileged container from which the guest itself can be harmed. Its pod has to be [`privileged`].
#[derive(Debug)]
pub struct Saboteur {
    /// The container.
    pub id: String,
    cri: Cri,
}

/// Writes over the agent's code. The kernel ignores a SIGKILL to the guest's PID 1 and keeps its process numbers from
/// containers, so this is run by the guest's kernel itself, for a process that dumps core: as root, in PID 1's
/// namespaces. PID 1 dies of its next instruction and the kernel of its PID 1.
const KILL_AGENT: &str = r#"
set -e
root=/run/ctvm/share/$1
cat > /k <<END
#!$root/usr/bin/busybox sh
b=$root/usr/bin/busybox
range=\$(\$b grep -m1 r-xp /proc/1/maps)
start=\$((0x\${range%%-*} / 4096)); end=\${range%% *}; end=\$((0x\${end#*-} / 4096))
\$b dd if=/dev/zero of=/proc/1/mem bs=4096 seek=\$start count=\$((end - start)) conv=notrunc
END
chmod +x /k
echo "|$root/k" > /proc/sys/kernel/core_pattern
sh -c 'kill -SEGV $$'
"#;

impl Saboteur {
    /// Starts it.
    pub fn start(pod: &Pod, cri: &Cri) -> Result<Saboteur> {
        let mut config = pod.forever();
        security(&mut config).privileged = true;
        let id = pod.start(&config)?;
        pod.wait_until_ready(&config)?;
        Ok(Saboteur { id, cri: cri.clone() })
    }

    /// Runs a shell script in the container; it may end with the guest, or not at all.
    pub fn run(&self, script: &str, seconds: i64) -> Result<crate::client::Output> {
        self.cri.exec(&self.id, &["sh", "-c", script, "sh", &self.id], seconds)
    }

    /// Kills the agent.
    pub fn kill_agent(&self) -> Result<()> {
        let done = self.run(KILL_AGENT, 60);
        // The guest has ended under the command, or will soon.
        if let Ok(output) = done {
            ensure!(output.code >= 128, "the agent's killer failed: {output:?}");
        }
        Ok(())
    }
}
