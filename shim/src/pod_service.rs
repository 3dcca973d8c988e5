//! containerd's Sandbox service: decode, one call, encode. Design: [`pod_life`](crate::sandbox::pod_life).

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::{Sandbox as SandboxApi, create_sandbox};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::TaskError;
use crate::sandbox::Sandbox;
use crate::service::run;

/// The Sandbox service of one sandbox.
#[derive(Debug, Clone)]
pub struct PodService(Arc<Sandbox>);

/// The table of methods to serve.
pub fn service(sandbox: &Arc<Sandbox>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(PodService(sandbox.clone())))
}

impl PodService {
    /// The sandbox, if it is the one that is meant and one for this API.
    fn pod(&self, id: &str) -> Result<Arc<Sandbox>, TaskError> {
        if id == self.0.id && self.0.is_pod() {
            Ok(self.0.clone())
        } else {
            Err(TaskError::NoContainer(id.to_owned()))
        }
    }
}

#[async_trait]
impl SandboxApi for PodService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        log::debug!("create sandbox {}", request.sandbox_id);
        let pod = self.pod(&request.sandbox_id)?;
        run(async move { pod.create_pod(&request) }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        log::debug!("start sandbox {}", request.sandbox_id);
        Ok(self.pod(&request.sandbox_id)?.start_pod().await?)
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.pod(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        // Go's word for x86_64.
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        log::debug!("stop sandbox {}", request.sandbox_id);
        let pod = self.pod(&request.sandbox_id)?;
        run(async move {
            pod.stop_pod().await;
            Ok(())
        })
        .await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        Ok(self.pod(&request.sandbox_id)?.wait_pod().await?)
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        Ok(self.pod(&request.sandbox_id)?.pod_status())
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        pod.running_vm().ok_or(TaskError::Finished)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        log::debug!("shutdown sandbox {}", request.sandbox_id);
        let pod = self.pod(&request.sandbox_id)?;
        run(async move { Ok(pod.shutdown(true).await) }).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Ok(self.pod(&request.sandbox_id)?.pod_metrics().await?)
    }
}
