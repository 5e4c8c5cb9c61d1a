//! Credential helpers: what they say, and what happens when they do not.

use std::fs::{Permissions, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use crate::error::Error;
use crate::registry::credentials::Credential;
use crate::registry::secret::Secret;
use crate::registry::vault::{Vault, ask_helper};

fn helper(directory: &Path, script: &str) -> PathBuf {
    let path = directory.join("docker-credential-test");
    write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

fn ask(script: &str) -> crate::error::Result<Option<Credential>> {
    let directory = tempfile::tempdir().unwrap();
    let path = helper(directory.path(), script);
    // Between writing a script and running it another test may fork with it open for writing.
    for _ in 0..100 {
        match ask_helper(path.to_str().unwrap(), "r.example") {
            Err(error) if error.to_string().contains("Text file busy") => {}
            other => return other,
        }
    }
    panic!("the script stays busy");
}

#[test]
fn a_helper_is_asked_by_get_with_the_key_on_its_input() {
    let script = r#"read -r key; test "$1" = get || exit 1
        printf '{"ServerURL":"%s","Username":"<token>","Secret":"s-%s"}' "$key" "$key""#;
    let found = ask(script).unwrap();
    assert_eq!(found, Some(Credential::IdentityToken(Secret::new("s-r.example"))));
}

#[test]
fn a_helper_without_an_answer_is_nothing_and_a_failing_one_an_error() {
    let nothing = "echo 'credentials not found in native keychain'; exit 1";
    assert_eq!(ask(nothing).unwrap(), None);
    for script in ["echo secret; exit 3", "echo '{\"Username\":\"secret\"}'", "exec yes secret"] {
        let error = ask(script).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    let error = ask_helper("docker-credential-that-does-not-exist", "h").unwrap_err();
    assert!(error.to_string().contains("cannot be run"), "{error}");
}

#[test]
fn a_helper_that_hangs_is_ended() {
    let began = Instant::now();
    let error = ask("exec sleep 60").unwrap_err();
    assert!(error.to_string().contains("no answer"), "{error}");
    assert!(began.elapsed().as_secs() < 30);
}

#[test]
fn a_helper_that_has_said_all_and_does_not_end_is_ended() {
    let error = ask("echo '{}'; exec sleep 60 >&-").unwrap_err();
    assert!(error.to_string().contains("does not end"), "{error}");
}

#[test]
fn the_file_is_read_again_when_it_changes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.json");
    let vault = Vault::new(Some(path.clone()));
    assert_eq!(vault.find("h").unwrap(), None, "a missing file says nothing");
    write(&path, json!({"auths": {"h": {"auth": "dTpw"}}}).to_string()).unwrap();
    assert_eq!(vault.find("h").unwrap(), Some(Credential::Basic(Secret::new("dTpw"))));
    write(&path, json!({"auths": {"h": {"auth": "dTpwMg=="}}}).to_string()).unwrap();
    assert_eq!(vault.find("h").unwrap(), Some(Credential::Basic(Secret::new("dTpwMg=="))));
    write(&path, "{").unwrap();
    assert!(vault.find("h").is_err(), "a damaged file is an error, not an empty one");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(vault.find("h").unwrap(), None);
    assert_eq!(Vault::new(None).find("h").unwrap(), None);
}
