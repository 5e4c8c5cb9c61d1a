//! Tokens, passwords, redirects and certificates against scripted servers.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::PrivateKeyDer;
use serde_json::json;

use crate::config::SECOND_NS;
use crate::engine::{Core, Lane, block_on};
use crate::error::Error;
use crate::registry::client::{BlobRef, Client};
use crate::registry::client_tests::{ID, plain, run, shared};
use crate::registry::config::Backend;
use crate::registry::route::Shared;
use crate::registry::secret::Secret;
use crate::registry::server_tests::{Play, Server, blob, json, partial, status};

fn challenge(realm: &Server) -> String {
    format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"s\"\r\n", realm.host())
}

/// Hands out t0, t1, ... with the given rest of the answer.
fn token_server(rest: &'static str) -> Server {
    let count = AtomicUsize::new(0);
    Server::start(move |_| {
        let number = count.fetch_add(1, Ordering::SeqCst);
        Play::Send(json(&format!("{{\"token\":\"t{number}\"{rest}}}")))
    })
}

#[test]
fn a_challenge_is_answered_once_and_the_token_used_on() {
    let tokens = token_server("");
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer t0") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &demand)),
    });
    run(shared(), plain(&registry, json!({"auth": "dTpw"})), |world| async move {
        world.read(0..10).await.unwrap();
        world.read(10..20).await.unwrap();
    });
    assert_eq!(registry.seen().len(), 3);
    assert!(registry.seen().iter().all(|seen| seen.connection == 0), "a 401 keeps its connection");
    let [asked] = &tokens.seen()[..] else { panic!("one token for all") };
    assert_eq!(asked.line, "GET /token?service=s&scope=repository:r:pull");
    assert_eq!(asked.header("Authorization"), Some("Basic dTpw"));
}

#[test]
fn a_token_that_is_refused_is_renewed_once_per_request() {
    let tokens = token_server("");
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match (seen.number, seen.header("Authorization")) {
        (0, _) => Play::Send(status(401, &demand)),
        // A token that ran out looks forbidden at some registries.
        (1, Some("Bearer t0")) => Play::Send(partial(seen)),
        (2, Some("Bearer t0")) => Play::Send(status(403, "")),
        (3, Some("Bearer t1")) => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &demand)),
    });
    run(shared(), plain(&registry, json!({})), |world| async move {
        world.read(0..10).await.unwrap();
        world.read(0..10).await.unwrap();
        let error = world.read(0..10).await.unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error}");
        assert!(error.to_string().contains("docker login"), "{error}");
    });
    assert_eq!(registry.seen().len(), 6, "refused twice, then given up");
    assert_eq!(tokens.seen()[0].header("Authorization"), None, "nobody to be: anonymous");
}

#[test]
fn a_token_past_its_end_is_renewed_before_it_is_used() {
    let tokens = token_server(",\"expires_in\":1");
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some(_) => Play::Send(partial(seen)),
        None => Play::Send(status(401, &demand)),
    });
    run(shared(), plain(&registry, json!({})), |world| async move {
        world.read(0..10).await.unwrap();
        let _ = world.core.sleep(SECOND_NS + SECOND_NS / 10).await;
        world.read(0..10).await.unwrap();
    });
    let used: Vec<_> =
        registry.seen().iter().map(|seen| seen.header("Authorization").map(String::from)).collect();
    assert_eq!(used, [None, Some("Bearer t0".into()), Some("Bearer t1".into())]);
}

#[test]
fn cores_share_one_token_fetch() {
    let tokens = token_server("");
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer t0") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &demand)),
    });
    let shared = shared();
    let backend = Backend::parse("registry", &plain(&registry, json!({}))).unwrap();
    let route = shared.route(&backend).unwrap();
    let read = || {
        let (shared, route) = (Arc::clone(&shared), Arc::clone(&route));
        block_on(move |core: Core| async move {
            let client = Client::new(shared);
            let until_ns = core.now() + 5 * SECOND_NS;
            let blob = BlobRef { id: ID };
            client.open(&core, &route, blob, 0..10, until_ns, Lane::Demand).await.map(drop)
        })
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(read)).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap().unwrap());
    });
    assert_eq!(tokens.seen().len(), 1);
}

#[test]
fn one_requests_deadline_is_not_the_next_ones_failure() {
    let is_stuck = Arc::new(AtomicBool::new(true));
    let stuck = Arc::clone(&is_stuck);
    let tokens = Server::start(move |_| match stuck.load(Ordering::SeqCst) {
        true => Play::Stall,
        false => Play::Send(json("{\"token\":\"t0\"}")),
    });
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer t0") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &demand)),
    });
    run(shared(), plain(&registry, json!({})), |world| async move {
        let soon_ns = world.core.now() + SECOND_NS / 2;
        let error = world.read_by(0..10, soon_ns).await.unwrap_err();
        assert!(matches!(error, Error::Deadline(_)), "{error}");
        is_stuck.store(false, Ordering::SeqCst);
        world.read(0..10).await.unwrap();
    });
    assert_eq!(tokens.seen().len(), 2);
}

#[test]
fn passwords_come_from_dockers_file_and_change_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.json");
    let registry = Server::start(|seen| match seen.header("Authorization") {
        Some("Basic dTpwMg==") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, "WWW-Authenticate: Basic realm=\"x\"\r\n")),
    });
    let auths = |auth: &str| json!({"auths": {registry.host(): {"auth": auth}}}).to_string();
    std::fs::write(&file, auths("dTpw")).unwrap();
    let right = auths("dTpwMg==");
    let shared = Shared::at(Some(file.clone()), Path::new("/nonexistent"));
    run(shared, plain(&registry, json!({})), |world| async move {
        assert!(matches!(world.read(0..10).await, Err(Error::Denied(_))));
        std::fs::write(&file, right).unwrap();
        world.read(0..10).await.unwrap();
    });
}

#[test]
fn a_password_given_at_run_time_replaces_the_configured_one() {
    let registry = Server::start(|seen| match seen.header("Authorization") {
        Some("Basic dTpwMg==") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, "WWW-Authenticate: Basic realm=\"x\"\r\n")),
    });
    let shared = shared();
    shared.set_basic(Some(Secret::new("dTpwMg==")));
    run(shared, plain(&registry, json!({"auth": "dTpw"})), |world| async move {
        world.read(0..10).await.unwrap();
    });
}

#[test]
fn identity_tokens_are_exchanged_by_post() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.json");
    let tokens = token_server("");
    let demand = challenge(&tokens);
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer t0") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &demand)),
    });
    let auths = json!({"auths": {registry.host(): {"identitytoken": "i/d"}}}).to_string();
    std::fs::write(&file, auths).unwrap();
    let shared = Shared::at(Some(file), Path::new("/nonexistent"));
    run(shared, plain(&registry, json!({})), |world| async move {
        world.read(0..10).await.unwrap();
    });
    let asked = &tokens.seen()[0];
    assert_eq!(asked.line, "POST /token");
    assert!(asked.text.contains("grant_type=refresh_token"), "{}", asked.text);
    assert!(asked.text.ends_with("&refresh_token=i/d"), "{}", asked.text);
}

#[test]
fn a_redirect_is_followed_without_credentials_and_remembered() {
    let storage = Server::start(|seen| match seen.number {
        2 => Play::Send(status(403, "")),
        _ => Play::Send(partial(seen)),
    });
    let target = format!("Location: http://{}/data?X-Amz-Expires=100&sig=s\r\n", storage.host());
    let registry = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer given") => Play::Send(status(307, &target)),
        _ => Play::Send(status(401, "")),
    });
    run(shared(), plain(&registry, json!({"registry_token": "given"})), |world| async move {
        for _ in 0..3 {
            assert_eq!(world.read(3..9).await.unwrap(), blob()[3..9]);
        }
    });
    assert_eq!(registry.seen().len(), 2, "asked again only when storage refused");
    let asked = storage.seen();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|seen| seen.header("Authorization").is_none()));
    assert!(asked.iter().all(|seen| seen.line == "GET /data?X-Amz-Expires=100&sig=s"));
}

#[test]
fn a_relative_redirect_keeps_credentials_and_loops_end() {
    let registry = Server::start(|seen| match seen.line.as_str() {
        "GET /there?x=1" => Play::Send(partial(seen)),
        line if line.ends_with("10") => Play::Send(status(302, "Location: /loop10\r\n")),
        _ => Play::Send(status(302, "Location: /there?x=1\r\n")),
    });
    run(shared(), plain(&registry, json!({"registry_token": "t"})), |world| async move {
        world.read(0..10).await.unwrap();
    });
    assert_eq!(registry.seen()[1].header("Authorization"), Some("Bearer t"));
    let endless = Server::start(|_| Play::Send(status(302, "Location: /again\r\n")));
    run(shared(), plain(&endless, json!({})), |world| async move {
        let error = world.read(0..10).await.unwrap_err();
        assert!(error.to_string().contains("redirects for ever"), "{error}");
    });
}

#[test]
fn a_redirects_host_and_scheme_obey_the_configuration() {
    let storage = Server::start(|seen| Play::Send(partial(seen)));
    let registry =
        Server::start(|_| Play::Send(status(307, "Location: https://elsewhere.invalid/data\r\n")));
    let extra = json!({"blob_url_scheme": "http", "blob_redirected_host": storage.host()});
    run(shared(), plain(&registry, extra), |world| async move {
        world.read(0..10).await.unwrap();
    });
    assert_eq!(storage.seen()[0].line, "GET /data");
}

#[test]
fn a_mirror_cannot_name_the_token_server_of_the_origin() {
    let thief = token_server("");
    let tokens = token_server("");
    let (bad, good) = (challenge(&thief), challenge(&tokens));
    let mirror = Server::start(move |seen| match seen.header("Authorization") {
        Some("Bearer t0") => Play::Send(partial(seen)),
        _ => Play::Send(status(401, &bad)),
    });
    let origin = Server::start(move |_| Play::Send(status(401, &good)));
    let mirrors =
        json!({"auth": "dTpw", "mirrors": [{"host": format!("http://{}", mirror.host())}]});
    run(shared(), plain(&origin, mirrors), |world| async move {
        world.read(0..10).await.unwrap();
    });
    assert_eq!(thief.seen().len(), 0);
    assert_eq!(origin.seen()[0].line, "GET /v2/");
    assert_eq!(tokens.seen().len(), 1);
}

/// A CA's certificate as PEM and a server's configuration for `name` signed by it.
fn authority(name: &str) -> (String, Arc<ServerConfig>) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca_params = CertificateParams::new(Vec::new()).unwrap();
    ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = ca_params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::from_params(&ca_params, &ca_key);
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_string()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (ca.pem(), Arc::new(config))
}

#[test]
fn tls_with_a_private_authority_works_and_strangers_are_refused() {
    let (pem, config) = authority("127.0.0.1");
    let server = Server::start_tls(config, |seen| Play::Send(partial(seen)));
    let certificates = tempfile::tempdir().unwrap();
    let own = certificates.path().join(server.host());
    std::fs::create_dir(&own).unwrap();
    let (host, path) = (server.host(), own.join("ca.crt"));
    let config = json!({"host": host, "repo": "r"});
    run(Shared::at(None, certificates.path()), config, move |world| async move {
        let error = world.read(0..10).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
        std::fs::write(path, pem).unwrap();
        assert_eq!(world.read(0..250_000).await.unwrap(), blob()[..250_000]);
        assert_eq!(world.read(7..9).await.unwrap(), blob()[7..9]);
    });
    let seen = server.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].connection, seen[1].connection, "TLS connections are kept too");
}

#[test]
fn a_certificate_for_another_host_is_refused_unless_told_to_skip() {
    let (pem, config) = authority("other.example");
    let server = Server::start_tls(config, |seen| Play::Send(partial(seen)));
    let certificates = tempfile::tempdir().unwrap();
    let own = certificates.path().join(server.host());
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("ca.crt"), pem).unwrap();
    let config = json!({"host": server.host(), "repo": "r"});
    run(Shared::at(None, certificates.path()), config, |world| async move {
        let error = world.read(0..10).await.unwrap_err();
        assert!(error.to_string().contains("certificate"), "{error}");
    });
    assert_eq!(server.seen().len(), 0, "nothing was said to a stranger");
    let config = json!({"host": server.host(), "repo": "r", "skip_verify": true});
    run(shared(), config, |world| async move {
        world.read(0..100_000).await.unwrap();
    });
}
