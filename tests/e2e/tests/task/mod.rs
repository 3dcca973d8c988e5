//! What `ctr` has no command for, asked of the container's shim itself.

use std::fs;

use agent_api::protobuf::well_known_types::any::Any;
use agent_api::task::{TaskClient, UpdateTaskRequest};
use agent_api::ttrpc::r#async::Client;
use agent_api::ttrpc::context::with_duration;
use anyhow::Result;
use e2e::{Containerd, command};
use serde_json::Value;

/// Changes a container's limits by `Task.Update`, as containerd has it done.
pub fn update(containerd: &Containerd, id: &str, resources: &Value) -> Result<()> {
    let address = fs::read_to_string(containerd.bundle(id).join("address"))?;
    let resources = Any {
        type_url: agent_api::RESOURCES_TYPE_URL.to_owned(),
        value: resources.to_string().into_bytes(),
        ..Any::default()
    };
    let request =
        UpdateTaskRequest { id: id.to_owned(), resources: Some(resources).into(), ..Default::default() };
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let task = TaskClient::new(Client::connect(&address).await?);
        task.update(with_duration(command::LIMIT), &request).await?;
        Ok(())
    })
}
