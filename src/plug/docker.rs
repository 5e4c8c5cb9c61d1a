//! Docker's graphdriver protocol, version 1: a method and its arguments to what a driver does.
//!
//! Every error is `{"Err": "..."}`, which Docker shows to the one who typed the command. Docker
//! says where its home is once, at its start; the plugin notes it, so that after a restart of its
//! own it can serve at once.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::docker_origin::{ImageStore, Settings};
use super::driver::Driver;
use super::driver_images::Service;
use super::stack::Stack;
use crate::config;
use crate::error::{Error, Result};

/// What an operator decides about one plugin.
pub struct Options {
    /// Where layers are kept instead of where Docker says.
    pub root: Option<PathBuf>,
    /// Where Docker's `image` directory is, if not beside its home for us.
    pub image_root: Option<PathBuf>,
    /// Where the plugin notes its home.
    pub note: PathBuf,
    /// Registries that need to be explained.
    pub settings: Settings,
}

/// One plugin: what Docker calls.
pub struct Plugin {
    options: Options,
    service: Arc<Service>,
    driver: Mutex<Option<Arc<Driver>>>,
}

/// What a call is answered with.
pub enum Answer {
    /// A JSON object.
    Json(Value),
    /// What a stack of layers holds, as a tar.
    Tar(Stack),
}

/// The arguments of all methods; Docker leaves out those that are empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Arguments {
    #[serde(rename = "ID")]
    id: String,
    parent: Option<String>,
    mount_label: Option<String>,
    storage_opt: Option<BTreeMap<String, String>>,
    home: String,
    opts: Option<Vec<String>>,
    #[serde(rename = "UIDMaps")]
    uid_maps: Option<Vec<Value>>,
    #[serde(rename = "GIDMaps")]
    gid_maps: Option<Vec<Value>>,
}

impl Arguments {
    fn parse(bytes: &[u8]) -> Result<Arguments> {
        match bytes.trim_ascii().is_empty() {
            true => Ok(Arguments::default()),
            false => serde_json::from_slice(bytes)
                .map_err(|error| Error::Malformed(format!("the request is not JSON: {error}"))),
        }
    }

    fn parent(&self) -> Option<&str> {
        self.parent.as_deref().filter(|parent| !parent.is_empty())
    }
}

impl Plugin {
    /// Takes up the layers of an earlier run, if there was one.
    pub fn new(options: Options, service: Arc<Service>) -> Result<Plugin> {
        let plugin = Plugin { options, service, driver: Mutex::new(None) };
        if let Some(home) = plugin.noted_home()
            && home.is_dir()
        {
            plugin.open(&home)?;
        }
        Ok(plugin)
    }

    /// Answers one call. `target` is the request's path and query; the body of `ApplyDiff` is a
    /// tar, of all other methods a short JSON object.
    pub fn call(&self, target: &str, body: &mut dyn Read) -> Result<Answer> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let method = path.trim_start_matches('/');
        if method == "GraphDriver.ApplyDiff" {
            let id = query_value(query, "id")?;
            let size = self.driver()?.apply(&id, body)?;
            return Ok(Answer::Json(json!({ "Size": size.min(i64::MAX as u64) })));
        }
        let mut bytes = Vec::new();
        body.take(config::DOCKER_ARGUMENTS_MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::io(&error, "the request broke off"))?;
        if bytes.len() as u64 > config::DOCKER_ARGUMENTS_MAX_BYTES {
            return Err(Error::Malformed("the request's arguments are too long".to_owned()));
        }
        let arguments = Arguments::parse(&bytes)?;
        if method == "GraphDriver.Diff" {
            let driver = self.driver()?;
            return driver.diff(&arguments.id, arguments.parent()).map(Answer::Tar);
        }
        self.json(method, &arguments).map(Answer::Json)
    }

    /// Looks after images that nobody uses any more, for one turn.
    pub fn sweep(&self) {
        let look = Duration::from_millis(config::DOCKER_SWEEP_MS);
        let idle = Duration::from_millis(config::DOCKER_IMAGE_IDLE_MS);
        match self.driver() {
            Ok(driver) => {
                if let Err(error) = driver.sweep(idle, look) {
                    (self.service.say)(&error.to_string());
                }
                std::thread::sleep(look);
            }
            Err(_) => std::thread::sleep(look),
        }
    }

    /// The plugin stops: what nobody uses is not left to a successor that may not come.
    pub fn stop(&self) -> Result<()> {
        match self.driver() {
            Ok(driver) => driver.sweep(Duration::ZERO, Duration::ZERO),
            Err(_) => Ok(()),
        }
    }

    fn json(&self, method: &str, arguments: &Arguments) -> Result<Value> {
        let (id, parent) = (arguments.id.as_str(), arguments.parent());
        match method {
            "Plugin.Activate" => return Ok(json!({ "Implements": ["GraphDriver"] })),
            "GraphDriver.Init" => return self.init(arguments).map(|()| json!({})),
            "GraphDriver.Capabilities" => {
                return Ok(json!({ "Capabilities": { "ReproducesExactDiffs": false } }));
            }
            _ => {}
        }
        let driver = self.driver()?;
        match method.strip_prefix("GraphDriver.").unwrap_or_default() {
            "Create" | "CreateReadWrite" => {
                check_storage_options(arguments.storage_opt.as_ref())?;
                driver.create(id, parent, method == "GraphDriver.CreateReadWrite")?;
            }
            "Remove" => driver.remove(id)?,
            "Get" => {
                let label = arguments.mount_label.as_deref().unwrap_or_default();
                return Ok(json!({ "Dir": text(&driver.get(id, label)?)? }));
            }
            "Put" => driver.put(id)?,
            "Exists" => return Ok(json!({ "Exists": driver.exists(id) })),
            "Status" => return Ok(json!({ "Status": driver.status() })),
            "GetMetadata" => return Ok(json!({ "Metadata": driver.metadata(id)? })),
            "Changes" => {
                let changes = driver.changes(id, parent)?.into_iter().map(|change| {
                    let path = String::from_utf8_lossy(&change.path).into_owned();
                    json!({ "Path": path, "Kind": change.kind as u8 })
                });
                return Ok(json!({ "Changes": changes.collect::<Vec<_>>() }));
            }
            "DiffSize" => return Ok(json!({ "Size": driver.diff_size(id, parent)? })),
            "Cleanup" => driver.cleanup()?,
            _ => return Err(Error::Unsupported(format!("there is no method {method:.80}"))),
        }
        Ok(json!({}))
    }

    fn init(&self, arguments: &Arguments) -> Result<()> {
        let has = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if has(&arguments.uid_maps) || has(&arguments.gid_maps) {
            return Err(Error::Unsupported(
                "userns-remap is not supported: remove it from Docker's daemon.json".to_owned(),
            ));
        }
        if let Some(option) = arguments.opts.as_ref().and_then(|options| options.first()) {
            return Err(Error::Unsupported(format!(
                "there is no storage option {option:?}: remove it from Docker's daemon.json"
            )));
        }
        let home = match &self.options.root {
            Some(root) => root.clone(),
            None => PathBuf::from(&arguments.home),
        };
        if !home.is_absolute() {
            return Err(Error::Malformed(format!("the home {home:?} is no absolute path")));
        }
        let driver = self.open(&home)?;
        self.note_home(&home)?;
        driver.docker_started()
    }

    fn driver(&self) -> Result<Arc<Driver>> {
        let driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        driver.clone().ok_or_else(|| {
            Error::unavailable("Docker has not said yet where its layers are: restart Docker")
        })
    }

    /// The driver of a home directory, opened if it is not.
    fn open(&self, home: &Path) -> Result<Arc<Driver>> {
        let place = without_links(home)?;
        let mut driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = driver.as_ref().filter(|driver| driver.home() == place) {
            return Ok(driver.clone());
        }
        // One home at a time: the lock of the other is given back first.
        *driver = None;
        let image_root = self.options.image_root.as_deref();
        let store = ImageStore::beside(home, image_root, self.options.settings.clone());
        let opened = Arc::new(Driver::open(&place, store, self.service.clone())?);
        *driver = Some(opened.clone());
        Ok(opened)
    }

    fn noted_home(&self) -> Option<PathBuf> {
        if let Some(root) = &self.options.root {
            return Some(root.clone());
        }
        let note: Value = serde_json::from_slice(&std::fs::read(&self.options.note).ok()?).ok()?;
        Some(PathBuf::from(note["home"].as_str()?))
    }

    fn note_home(&self, home: &Path) -> Result<()> {
        let note = &self.options.note;
        let write = || {
            if let Some(directory) = note.parent() {
                std::fs::create_dir_all(directory)?;
            }
            let new = note.with_extension("new");
            std::fs::write(&new, json!({ "home": home }).to_string())?;
            std::fs::File::open(&new)?.sync_all()?;
            std::fs::rename(&new, note)
        };
        write().map_err(|error: std::io::Error| {
            Error::io(&error, format!("cannot write {}", note.display()))
        })
    }
}

/// The home, which is made, by the name that the kernel shows in its mount table: the daemon finds
/// there what it has mounted.
fn without_links(home: &Path) -> Result<PathBuf> {
    let made = DirBuilder::new().recursive(true).mode(0o710).create(home);
    made.and_then(|()| home.canonicalize())
        .map_err(|error| Error::io(&error, format!("cannot use {} for layers", home.display())))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::Malformed(format!("{} is not UTF-8", path.display())))
}

fn check_storage_options(options: Option<&BTreeMap<String, String>>) -> Result<()> {
    match options.and_then(|options| options.keys().next()) {
        Some(option) => Err(Error::Unsupported(format!(
            "--storage-opt {option} is not supported by this storage driver"
        ))),
        None => Ok(()),
    }
}

/// A value of a query, percent-decoded.
fn query_value(query: &str, name: &str) -> Result<String> {
    let values = query.split('&').filter_map(|pair| pair.split_once('='));
    let value = values.clone().find(|(key, _)| *key == name).map_or("", |(_, value)| value);
    let broken = || Error::Malformed(format!("the value of {name} in the request"));
    let mut bytes = Vec::new();
    let mut rest = value.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'%', [high, low, after @ ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).map_err(|_| broken())?;
                bytes.push(u8::from_str_radix(digits, 16).map_err(|_| broken())?);
                rest = after;
            }
            (b'%', _) => return Err(broken()),
            _ => bytes.push(*first),
        }
    }
    String::from_utf8(bytes).map_err(|_| broken())
}
