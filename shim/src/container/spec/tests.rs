use agent_api::SANDBOX_SHM;

use super::*;
use crate::container::overview::Role;

/// What `ctr run` of containerd 1.7 writes, shortened, with some of what CRI adds.
const CTR: &str = r#"{
    "ociVersion": "1.1.0",
    "process": {
        "terminal": false, "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "args": ["sh", "-c", "echo hi"], "env": ["PATH=/bin"], "cwd": "/",
        "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true, "apparmorProfile": "cri-containerd.apparmor.d", "oomScoreAdj": -998
    },
    "root": {"path": "rootfs", "readonly": true},
    "hostname": "web",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/run/containerd/sandboxes/x/shm", "options": ["rbind", "ro"]},
        {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/pod/hosts", "options": ["rbind", "rprivate", "rw"]},
        {"destination": "/data", "type": "none", "source": "/srv/data", "options": ["rbind", "ro", "rshared"]}
    ],
    "hooks": {"createRuntime": [{"path": "/usr/bin/hook"}]},
    "annotations": {"io.kubernetes.cri.sandbox-id": "pod1"},
    "linux": {
        "resources": {"devices": [{"allow": false, "access": "rwm"}], "cpu": {"shares": 2, "cpus": "0-3"}, "memory": {"limit": 1048576},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]},
        "cgroupsPath": "/default/web",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/9/ns/ipc"}, {"type": "uts"}, {"type": "mount"},
            {"type": "network", "path": "/var/run/netns/x"}],
        "devices": [{"path": "/dev/xvda", "type": "b", "major": 7, "minor": 4, "fileMode": 384, "uid": 5}, {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "listenerPath": "/run/s", "syscalls": []},
        "rootfsPropagation": "rshared", "maskedPaths": ["/proc/kcore"], "newerField": {"kept": true}
    }
}"#;

/// The container that has number 7 on the host is `db`.
fn place() -> Place<'static> {
    let container_of = &|pid| (pid == 7).then(|| "db".to_owned());
    Place { id: "web", share_path: "/run/ctvm/share", container_of, users: None }
}

fn rewritten() -> GuestSpec {
    for_guest(parse(CTR.as_bytes()).unwrap(), Role::Single, place()).unwrap()
}

fn with(change: impl Fn(&mut Value)) -> Result<GuestSpec, SpecError> {
    let mut config: Value = serde_json::from_str(CTR).unwrap();
    change(&mut config);
    for_guest(config, Role::Single, place())
}

#[test]
fn the_result_is_a_valid_oci_configuration() {
    // The agent reads it with the same crate.
    let spec: oci_spec::runtime::Spec = serde_json::from_slice(&rewritten().to_json()).unwrap();
    assert_eq!(spec.root().as_ref().unwrap().path().to_str(), Some("/run/ctvm/share/web"));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(true));
    assert_eq!(spec.linux().as_ref().unwrap().cgroups_path().as_deref(), Some("/ctvm/web".as_ref()));
    assert_eq!(spec.process().as_ref().unwrap().no_new_privileges(), Some(true));
}

#[test]
fn what_belongs_to_the_host_is_gone() {
    let spec = rewritten();
    let text = spec.config.to_string();
    for host in [
        "/usr/bin/hook",
        "/var/run/netns",
        "/proc/9",
        "apparmor.d",
        "0-3",
        "/run/s\"",
        "/srv/data",
        "rshared",
    ] {
        assert!(!text.contains(host), "{host} in {text}");
    }
    let namespaces = spec.config["linux"]["namespaces"].to_string();
    assert_eq!(namespaces, r#"[{"type":"pid"},{"type":"uts"},{"type":"mount"}]"#);
    assert!(spec.warnings.iter().any(|w| w.contains("AppArmor")), "{:?}", spec.warnings);
}

#[test]
fn block_devices_become_disks_of_the_vm() {
    let allow = json!({"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rm"});
    let mut spec = with(|c| {
        c["linux"]["resources"]["devices"].as_array_mut().unwrap().push(allow.clone());
        c["linux"]["devices"].as_array_mut().unwrap().reverse();
    })
    .unwrap();
    let disk = HostDisk { path: "/dev/xvda".into(), major: 7, minor: 4, read_only: true };
    assert_eq!(spec.disks, [disk]);
    spec.set_disk(0, 2);
    let devices = spec.config["linux"]["devices"].as_array().unwrap();
    assert_eq!((devices.len(), &devices[0]["path"]), (2, &json!("/dev/fuse")));
    assert_eq!((&devices[1]["major"], &devices[1]["minor"]), (&json!(-1), &json!(2)));
    assert_eq!((&devices[1]["fileMode"], &devices[1]["uid"]), (&json!(384), &json!(5)), "as it was");
}

#[test]
fn hooks_of_the_container_go_with_it_and_those_of_its_namespaces_are_refused() {
    let spec = with(|c| c["hooks"]["startContainer"] = json!([{"path": "/bin/in-container"}])).unwrap();
    assert_eq!(spec.config["hooks"], json!({"startContainer": [{"path": "/bin/in-container"}]}));
    assert!(rewritten().config.get("hooks").is_none());
    let e = with(|c| c["hooks"]["createContainer"] = json!([{"path": "/usr/bin/cdi"}])).unwrap_err();
    assert!(e.to_string().contains("createContainer hook \"/usr/bin/cdi\" cannot be run"), "{e}");
}

#[test]
fn huge_pages_are_the_guests_own() {
    let mut spec = with(|c| {
        let limits = json!([{"pageSize": "2MB", "limit": 4_194_304}, {"pageSize": "1GB", "limit": 0}]);
        c["linux"]["resources"]["hugepageLimits"] = limits;
    })
    .unwrap();
    let limits = &spec.config["linux"]["resources"]["hugepageLimits"];
    assert_eq!(*limits, json!([{"pageSize": "2MB", "limit": 4_194_304}]));
    spec.set_huge_pages(1, "2a-7", 2 << 20);
    let mount = &spec.config["mounts"][5];
    assert_eq!((&mount["type"], &mount["destination"]), (&json!("hugetlbfs"), &json!("/data")));
    assert_eq!(mount["source"], "ctvm-huge-pages-2a-7");
    assert_eq!(mount["options"].to_string(), r#"["pagesize=2097152","ro","nosuid","nodev"]"#);
    assert!(rewritten().config["linux"]["resources"].get("hugepageLimits").is_none(), "none of them");
    assert_eq!(crate::container::rootfs::huge_pages(Path::new("/proc")), None);
}

#[test]
fn devices_of_the_host_are_refused_or_left_out() {
    let kvm = json!({"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232});
    let e = with(|c| c["linux"]["devices"][0] = kvm.clone()).unwrap_err();
    assert!(e.to_string().contains("device \"/dev/kvm\" (c 10:232) is the host's"), "{e}");
    let spec = with(|c| {
        c["linux"]["devices"][0] = kvm.clone();
        c["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    });
    let spec = spec.unwrap();
    assert_eq!(spec.config["linux"]["devices"].as_array().unwrap().len(), 1);
    assert!(spec.warnings.iter().any(|w| w.contains("1 device(s)")), "{:?}", spec.warnings);
    let e = with(|c| c["linux"]["devices"] = json!({})).unwrap_err();
    assert!(e.to_string().contains("linux.devices is missing or not a list"), "{e}");
}

#[test]
fn what_is_not_named_passes_through() {
    let config = rewritten().config;
    assert_eq!(config["linux"]["newerField"]["kept"], true);
    assert_eq!(config["linux"]["resources"]["memory"]["limit"], 1_048_576);
    assert_eq!(config["linux"]["resources"]["cpu"]["shares"], 2);
    assert_eq!(config["linux"]["maskedPaths"][0], "/proc/kcore");
    assert_eq!(config["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(config["mounts"][0]["type"], "proc");
    assert_eq!(config["mounts"][2]["type"], "cgroup");
}

#[test]
fn binds_become_shares() {
    let mut spec = rewritten();
    assert_eq!(
        spec.binds,
        [
            Bind {
                source: "/var/lib/pod/hosts".into(),
                share: "web:mnt0".into(),
                read_only: false,
                live: false,
                map: None
            },
            Bind {
                source: "/srv/data".into(),
                share: "web:mnt1".into(),
                read_only: true,
                live: true,
                map: None
            },
        ]
    );
    spec.set_bind_source(0, "/run/ctvm/share/web:mnt0/hosts".as_ref());
    assert_eq!(spec.config["mounts"][4]["source"], "/run/ctvm/share/web:mnt0/hosts");
    assert_eq!(spec.config["mounts"][5]["source"], "/run/ctvm/share/web:mnt1");
    assert_eq!(spec.config["mounts"][5]["type"], "bind");
    assert_eq!(spec.config["mounts"][5]["options"].to_string(), r#"["rbind","ro","rprivate"]"#);
    // Shared memory is the guest's own, of the size that the host's had.
    assert_eq!(spec.shm(), Some(Path::new("/run/containerd/sandboxes/x/shm")));
    spec.set_shm_size(4096);
    let shm = &spec.config["mounts"][3];
    assert_eq!((&shm["type"], &shm["source"]), (&json!("tmpfs"), &json!(SANDBOX_SHM)));
    assert!(shm["options"].as_array().unwrap().contains(&json!("size=4096")), "{shm}");
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let e = with(|c| c["mounts"][0]["type"] = "nfs".into()).unwrap_err();
    assert!(e.to_string().contains("type \"nfs\" at \"/proc\" is not supported"), "{e}");
    let e = with(|c| c["mounts"][5]["options"][0] = "rbind".into());
    assert!(e.is_ok());
    let e = with(|c| c["mounts"][5]["options"][2] = "idmap".into()).unwrap_err();
    assert!(e.to_string().contains("mount at \"/data\" has no map, and the container no users"), "{e}");
    let e = with(|c| c["mounts"][5]["options"][2] = "uidmap=0:1:1".into()).unwrap_err();
    assert!(e.to_string().contains("option \"uidmap=0:1:1\" at \"/data\""), "{e}");
    let e = with(|c| c["mounts"][1]["uidMappings"] = json!([{"hostID": 1, "size": 1}])).unwrap_err();
    assert!(e.to_string().contains("mount at \"/dev\" is of type \"tmpfs\""), "{e}");
    let e = with(|c| c["mounts"][5]["uidMappings"] = json!([{"hostID": 1, "size": 1}])).unwrap_err();
    assert!(e.to_string().contains("mount at \"/data\" a map of 0 ranges"), "{e}");
    let e = with(|c| c["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into()).unwrap_err();
    assert!(e.to_string().contains("joining the pid namespace \"/proc/1/ns/pid\""), "{e}");
    let e = with(|c| c["mounts"][5]["source"] = "".into()).unwrap_err();
    assert!(e.to_string().contains("mounts[5].source is missing or not a path"), "{e}");
    let e = with(|c| c["process"]["args"] = json!([])).unwrap_err();
    assert!(e.to_string().contains("process.args"), "{e}");
    let relative = CTR.replace(r#""cwd": "/""#, r#""cwd": "usr""#);
    let e = for_guest(parse(relative.as_bytes()).unwrap(), Role::Single, place()).unwrap_err();
    assert!(e.to_string().contains("process.cwd"), "{e}");
    let e = with(|c| c["process"]["cwd"] = "relative".into()).unwrap_err();
    assert!(e.to_string().contains("process.cwd is missing or not an absolute path"), "{e}");
    let e = with(|c| c["linux"] = json!("x")).unwrap_err();
    assert!(e.to_string().contains("linux is missing or not an object"), "{e}");
    let e = parse(b"{").unwrap_err();
    assert!(matches!(e, SpecError::Json(_)));
}

#[test]
fn a_small_configuration_will_do() {
    let config = br#"{"ociVersion":"1.0.2","process":{"args":["/x"],"cwd":"/"}}"#;
    let spec = for_guest(parse(config).unwrap(), Role::Single, place()).unwrap();
    assert_eq!(spec.config["root"]["path"], "/run/ctvm/share/web");
    assert!(spec.binds.is_empty() && spec.warnings.is_empty());
}

#[test]
fn containers_of_a_pod_share_the_guests_namespaces() {
    let namespaces = |role, change: &dyn Fn(&mut Value)| {
        let mut config: Value = serde_json::from_str(CTR).unwrap();
        change(&mut config);
        let spec = for_guest(config, role, place())?;
        assert_eq!(spec.config.get("hostname").is_none(), role != Role::Single);
        Ok::<_, SpecError>(spec.config["linux"]["namespaces"].to_string())
    };
    for role in [Role::Pod, Role::Member] {
        assert_eq!(namespaces(role, &|_| ()).unwrap(), r#"[{"type":"pid"},{"type":"mount"}]"#);
    }
    let join = |c: &mut Value| c["linux"]["namespaces"][0]["path"] = "/proc/7/ns/pid".into();
    let joined = namespaces(Role::Member, &join).unwrap();
    assert_eq!(joined, r#"[{"path":"container:db","type":"pid"},{"type":"mount"}]"#);
}

#[test]
fn users_are_the_sandboxs_for_all_of_its_containers() {
    let map = |outside| [crate::container::users::IdMapping { inside: 0, outside, count: 65_536 }];
    let pods = crate::container::users::namespace(&map(100_000), &map(200_000)).unwrap();
    let result = |role, users: Option<&_>, change: &dyn Fn(&mut Value)| {
        let mut config: Value = serde_json::from_str(CTR).unwrap();
        config["linux"]["namespaces"][2] = json!({"type": "user", "path": "/proc/7/ns/user"});
        config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        config["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
        change(&mut config);
        for_guest(config, role, Place { users, ..place() })
    };
    let error =
        |users, change: &dyn Fn(&mut Value)| result(Role::Member, users, change).unwrap_err().to_string();
    let spec = result(Role::Member, Some(&pods), &|_| ()).unwrap();
    let namespaces = spec.config["linux"]["namespaces"].to_string();
    assert_eq!(namespaces, r#"[{"type":"pid"},{"path":"container:","type":"user"},{"type":"mount"}]"#);
    assert!(spec.config["linux"].get("uidMappings").is_none());
    assert!(error(None, &|_| ()).contains("asks for a user namespace, and its pod has none"));
    let none = |c: &mut Value| c["linux"]["namespaces"][2]["type"] = "uts".into();
    assert!(error(Some(&pods), &none).contains("has no user namespace, and its pod has one"));
    let other = |c: &mut Value| c["linux"]["uidMappings"][0]["hostID"] = 5.into();
    assert!(error(Some(&pods), &other).contains("has other id mappings"));
    let wrong = |c: &mut Value| c["linux"]["uidMappings"][0]["size"] = 0.into();
    assert!(error(Some(&pods), &wrong).contains("range 0:100000:0 of a map has no ids"));
    let early = |c: &mut Value| drop(c["linux"]["namespaces"][4].as_object_mut().unwrap().remove("path"));
    assert!(result(Role::Pod, Some(&pods), &early).is_ok());
    assert!(result(Role::Pod, Some(&pods), &|_| ()).is_ok());
    // One that names a namespace alone has the pod's maps.
    let bare = |c: &mut Value| {
        c["linux"].as_object_mut().unwrap().retain(|name, _| !name.ends_with("Mappings"));
    };
    assert!(result(Role::Member, Some(&pods), &bare).is_ok());
    let foreign = result(Role::Single, Some(&pods), &|_| ()).unwrap_err().to_string();
    assert!(foreign.contains("joining the user namespace \"/proc/7/ns/user\""), "{foreign}");
    let alone = |c: &mut Value| drop(c["linux"]["namespaces"][2].as_object_mut().unwrap().remove("path"));
    assert!(result(Role::Single, Some(&pods), &alone).is_ok());

    let mapped = |c: &mut Value| {
        c["mounts"][4]["options"].as_array_mut().unwrap().push("ridmap".into());
        c["mounts"][5]["uidMappings"] = json!([{"containerID": 1, "hostID": 7, "size": 2}]);
        c["mounts"][5]["gidMappings"] = json!([{"containerID": 1, "hostID": 8, "size": 2}]);
    };
    let spec = result(Role::Member, Some(&pods), &mapped).unwrap();
    assert_eq!(spec.binds[0].map, Some(IdMapped { maps: pods, recursive: true }));
    let map = spec.binds[1].map.as_ref().unwrap();
    assert_eq!((map.maps.gids.outside(2), map.recursive), (Some(9), false));
    // What is shifted is not what the host goes on mounting below.
    assert!(
        !spec.binds[1].live && spec.warnings.iter().any(|w| w.contains("mounts below it later is not seen"))
    );
    let options = spec.config["mounts"][5]["options"].to_string();
    assert_eq!(options, r#"["rbind","ro","rprivate"]"#);
}

#[test]
fn the_hosts_namespaces_are_refused_by_name() {
    for (position, kind) in [(0, "pid"), (1, "ipc")] {
        let e =
            with(|c| drop(c["linux"]["namespaces"].as_array_mut().unwrap().remove(position))).unwrap_err();
        assert_eq!(e, SpecError::HostNamespace { kind });
        assert!(e.to_string().contains(&format!("the host's {kind} namespace cannot be used")), "{e}");
    }
}
