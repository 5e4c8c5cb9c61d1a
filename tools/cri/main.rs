//! A small client of containerd's CRI service, as the kubelet is one: for tests.
//!
//! Owns the command line and the few messages it needs, written by hand after the Kubernetes
//! project's `runtime/v1/api.proto`. Pods share the host's network, so no CNI is needed. Prints ids
//! and what containers print; anything that goes wrong is said and ends with 1.
//!
//! ```text
//! cri --address SOCKET pull IMAGE [--user NAME:PASSWORD]
//! cri --address SOCKET run-pod NAME            cri ... remove-pod POD
//! cri --address SOCKET create POD NAME IMAGE [--mount HOST:CONTAINER]... -- COMMAND...
//! cri --address SOCKET start|wait|remove CONTAINER
//! cri --address SOCKET exec CONTAINER -- COMMAND...
//! cri --address SOCKET remove-image IMAGE
//! ```

mod messages;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use messages::*;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// How long a container may run before waiting for its end is given up.
const WAIT: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Arguments {
    /// containerd's socket.
    #[arg(long)]
    address: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Pull an image; prints what it is known by.
    Pull {
        image: String,
        /// Credentials, as from an image-pull secret.
        #[arg(long)]
        user: Option<String>,
    },
    /// Remove an image.
    RemoveImage { image: String },
    /// Start a pod's sandbox; prints its id.
    RunPod { name: String },
    /// Stop and remove a pod with all its containers.
    RemovePod { pod: String },
    /// Make a container; prints its id.
    Create {
        pod: String,
        name: String,
        image: String,
        #[arg(long = "mount")]
        mounts: Vec<String>,
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Start a container.
    Start { container: String },
    /// Wait for a container's end; its exit code is ours.
    Wait { container: String },
    /// Run a command in a container; its output and exit code are ours.
    Exec {
        container: String,
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Stop and remove a container.
    Remove { container: String },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments)),
        Err(error) => Err(Status::internal(error.to_string())),
    };
    match done {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(status) => {
            eprintln!("cri: {:?}: {}", status.code(), status.message());
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<i32, Status> {
    let address = format!("unix://{}", arguments.address.display());
    let endpoint = Endpoint::from_shared(address).map_err(|e| Status::internal(e.to_string()))?;
    let channel = endpoint.connect().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let cri = Cri { channel };
    match arguments.command {
        Command::Pull { image, user } => cri.pull(image, user).await?,
        Command::RemoveImage { image } => {
            let image = Some(ImageSpec { image });
            let _: Empty = cri.image("RemoveImage", ImageRequest { image }).await?;
        }
        Command::RunPod { name } => {
            let config = Some(sandbox(&name));
            let made: Id = cri.runtime("RunPodSandbox", RunPodSandboxRequest { config }).await?;
            println!("{}", made.id);
        }
        Command::RemovePod { pod } => {
            let _: Empty = cri.runtime("StopPodSandbox", Id { id: pod.clone() }).await?;
            let _: Empty = cri.runtime("RemovePodSandbox", Id { id: pod }).await?;
        }
        Command::Create { pod, name, image, mounts, command } => {
            let config = Some(container(&name, image, &mounts, command)?);
            let sandbox_config = Some(sandbox(&pod));
            let request = CreateContainerRequest { pod_sandbox_id: pod, config, sandbox_config };
            let made: Id = cri.runtime("CreateContainer", request).await?;
            println!("{}", made.id);
        }
        Command::Start { container } => {
            let _: Empty = cri.runtime("StartContainer", Id { id: container }).await?;
        }
        Command::Wait { container } => return cri.wait(container).await,
        Command::Exec { container, command } => return cri.exec(container, command).await,
        Command::Remove { container } => {
            let _: Empty = cri.runtime("StopContainer", Id { id: container.clone() }).await?;
            let _: Empty = cri.runtime("RemoveContainer", Id { id: container }).await?;
        }
    }
    Ok(0)
}

struct Cri {
    channel: Channel,
}

impl Cri {
    async fn runtime<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.call(format!("/runtime.v1.RuntimeService/{method}"), request).await
    }

    async fn image<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.call(format!("/runtime.v1.ImageService/{method}"), request).await
    }

    async fn call<Q, A>(&self, path: String, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = http::uri::PathAndQuery::try_from(path)
            .map_err(|error| Status::internal(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        grpc.unary(Request::new(request), path, codec).await.map(tonic::Response::into_inner)
    }

    async fn pull(&self, image: String, user: Option<String>) -> Result<(), Status> {
        let split = user.as_deref().and_then(|user| user.split_once(':'));
        let auth = split.map(|(username, password)| AuthConfig {
            username: username.to_owned(),
            password: password.to_owned(),
        });
        let request = PullImageRequest { image: Some(ImageSpec { image }), auth };
        let pulled: Id = self.image("PullImage", request).await?;
        println!("{}", pulled.id);
        Ok(())
    }

    async fn wait(&self, container: String) -> Result<i32, Status> {
        let deadline = Instant::now() + WAIT;
        loop {
            let request = Id { id: container.clone() };
            let answer: ContainerStatusResponse = self.runtime("ContainerStatus", request).await?;
            let status = answer.status.unwrap_or_default();
            if status.state == ContainerStatus::EXITED {
                return Ok(status.exit_code);
            }
            if Instant::now() >= deadline {
                return Err(Status::deadline_exceeded("the container goes on"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn exec(&self, container_id: String, command: Vec<String>) -> Result<i32, Status> {
        let timeout = i64::try_from(WAIT.as_secs()).unwrap_or(i64::MAX);
        let request = ExecSyncRequest { container_id, command, timeout };
        let answer: ExecSyncResponse = self.runtime("ExecSync", request).await?;
        let printed = std::io::stdout().write_all(&answer.stdout);
        let complained = std::io::stderr().write_all(&answer.stderr);
        printed.and(complained).map_err(|error| Status::internal(error.to_string()))?;
        Ok(answer.exit_code)
    }
}

/// The same for the pod and for its containers: containerd looks at little of it twice.
fn sandbox(name: &str) -> PodSandboxConfig {
    let namespaces = NamespaceOption { network: NamespaceOption::NODE };
    let security = SandboxSecurityContext { namespace_options: Some(namespaces) };
    PodSandboxConfig {
        metadata: Some(PodMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "default".to_owned(),
        }),
        linux: Some(LinuxPodSandboxConfig { security_context: Some(security) }),
    }
}

fn container(
    name: &str,
    image: String,
    mounts: &[String],
    command: Vec<String>,
) -> Result<ContainerConfig, Status> {
    let mount = |text: &String| {
        let (host, inside) = text
            .split_once(':')
            .ok_or_else(|| Status::invalid_argument(format!("--mount {text}: HOST:CONTAINER")))?;
        Ok(Mount { container_path: inside.to_owned(), host_path: host.to_owned(), readonly: true })
    };
    let namespaces = NamespaceOption { network: NamespaceOption::NODE };
    let security = ContainerSecurityContext { namespace_options: Some(namespaces) };
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned() }),
        image: Some(ImageSpec { image }),
        command,
        mounts: mounts.iter().map(mount).collect::<Result<_, Status>>()?,
        linux: Some(LinuxContainerConfig { security_context: Some(security) }),
    })
}
