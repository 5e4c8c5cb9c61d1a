//! What a backend configuration may say, and how each refusal names its key.

use serde_json::{Value, json};

use crate::config::SECOND_NS;
use crate::registry::config::{Backend, RegistryConfig};
use crate::registry::origin::Scheme;

fn registry(extra: Value) -> RegistryConfig {
    match parse(extra) {
        Ok(Backend::Registry(config)) => *config,
        other => panic!("{other:?}"),
    }
}

fn parse(extra: Value) -> crate::error::Result<Backend> {
    let mut config = json!({"host": "r.example:5000", "repo": "a/b"});
    let extra = extra.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(extra);
    Backend::parse("registry", &config)
}

#[test]
fn the_guides_configuration_means_docker_hub() {
    let config = json!({"scheme": "https", "host": "index.docker.io", "repo": "hsiangkao/ubuntu"});
    let Ok(Backend::Registry(config)) = Backend::parse("registry", &config) else { panic!() };
    assert_eq!(config.origin.to_string(), "https://registry-1.docker.io");
    assert_eq!(config.credential_host, "docker.io");
    assert_eq!(config.repo, "hsiangkao/ubuntu");
    let config = registry(json!({"host": "docker.io", "repo": "ubuntu"}));
    assert_eq!(config.repo, "library/ubuntu");
}

#[test]
fn the_snapshotters_configuration_is_honoured_in_full() {
    let config = registry(json!({
        "scheme": "http", "auth": "dTpw", "registry_token": "", "skip_verify": true, "timeout": 7,
        "connect_timeout": 0, "retry_limit": 3, "blob_url_scheme": "http",
        "blob_redirected_host": "cdn.example:81",
        "proxy": {"url": "http://u:p@proxy.example:3128", "ping_url": "http://proxy.example/ping",
            "fallback": false, "check_interval": 9, "use_http": true, "check_pause_elapsed": 20,
            "dragonfly_scheduler_endpoint": ""},
        "mirrors": [{"host": "http://m.example:65001/p/", "ping_url": "http://m.example/h",
            "headers": {"X-Registry": "https://r.example"}, "auth_through": true,
            "health_check_interval": 2, "failure_limit": 3}, {"host": "m2.example"}]
    }));
    assert_eq!((config.origin.scheme, config.origin.port), (Scheme::Http, 5000));
    assert_eq!((config.timeout_ns, config.connect_timeout_ns), (7 * SECOND_NS, 120 * SECOND_NS));
    assert_eq!(config.basic.as_ref().unwrap().reveal(), "dTpw");
    assert_eq!((config.token.is_none(), config.skip_verify, config.retry_limit), (true, true, 3));
    assert_eq!(config.blob_scheme, Some(Scheme::Http));
    assert_eq!(config.blob_redirected_host.as_deref(), Some("cdn.example:81"));
    let proxy = config.proxy.unwrap();
    assert_eq!(proxy.origin.host_port(), "proxy.example:3128");
    assert_eq!(proxy.authorization.unwrap().reveal(), "Basic dTpw");
    assert_eq!((proxy.fallback, proxy.use_http), (false, true));
    assert_eq!(proxy.check_interval_ns, 9 * SECOND_NS);
    let [first, second] = &config.mirrors[..] else { panic!("two mirrors") };
    assert_eq!((first.prefix.as_str(), first.failure_limit), ("/p", 3));
    assert_eq!(first.headers.reveal(), "X-Registry: https://r.example\r\n");
    assert!(first.auth_through && first.ping.is_some());
    assert_eq!(second.origin.to_string(), "https://m2.example");
    assert_eq!(second.health_check_interval_ns, 5 * SECOND_NS);
}

#[test]
fn defaults_are_those_of_nydus() {
    let config = registry(json!({"proxy": {"url": "http://p"}}));
    assert_eq!(config.origin.scheme, Scheme::Https);
    assert_eq!((config.timeout_ns, config.connect_timeout_ns), (5 * SECOND_NS, 5 * SECOND_NS));
    assert!(!config.skip_verify && config.proxy.unwrap().fallback);
    assert_eq!(registry(json!({"proxy": {"url": ""}, "auth": null, "mirrors": null})).proxy, None);
}

#[test]
fn every_refusal_names_its_key() {
    for (extra, named) in [
        (json!({"host": ""}), "host and repo"),
        (json!({"host": "a b"}), "backend_config.host"),
        (json!({"host": "http://a"}), "backend_config.host"),
        (json!({"repo": "A/../b"}), "backend_config.repo"),
        (json!({"scheme": "ftp"}), "backend_config.scheme"),
        (json!({"skip_verfy": true}), "skip_verfy"),
        (json!({"timeout": "5"}), "backend_config.timeout"),
        (json!({"timeout": -1}), "backend_config.timeout"),
        (json!({"auth": "secret"}), "backend_config.auth"),
        (json!({"registry_token": "secret\r\nx"}), "backend_config.registry_token"),
        (json!({"blob_url_scheme": "file"}), "blob_url_scheme"),
        (json!({"blob_redirected_host": "a/b"}), "blob_redirected_host"),
        (json!({"proxy": {"url": "https://p"}}), "proxy.url"),
        (json!({"proxy": {"url": "p:1"}}), "proxy.url"),
        (json!({"proxy": {"urll": "http://p"}}), "urll"),
        (json!({"proxy": {"ping_url": "x", "url": "http://p"}}), "proxy.ping_url"),
        (
            json!({"proxy": {"dragonfly_scheduler_endpoint": "http://s"}}),
            "dragonfly_scheduler_endpoint",
        ),
        (json!({"mirrors": [{}]}), "backend_config.mirrors[0]"),
        (json!({"mirrors": [{"host": "a?b"}]}), "mirrors.host"),
        (json!({"mirrors": [{"host": "a", "headers": {"Host": "x"}}]}), "mirrors.headers"),
        (json!({"mirrors": [{"host": "a", "headers": {"A": "x\ny"}}]}), "mirrors.headers"),
        (json!({"mirrors": [{"host": "a", "headers": {"A:": "x"}}]}), "mirrors.headers"),
    ] {
        let error = parse(extra.clone()).unwrap_err().to_string();
        assert!(error.contains(named), "{extra}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    for kind in ["oss", "s3", "localdisk", "http-proxy", "nonsense"] {
        let error = Backend::parse(kind, &json!({})).unwrap_err().to_string();
        assert!(error.contains(kind), "{error}");
    }
}

#[test]
fn localfs_names_a_file_or_directories() {
    let config = json!({"dir": "/a", "alt_dirs": ["/b", "/c"]});
    let Ok(Backend::LocalFs(config)) = Backend::parse("localfs", &config) else { panic!() };
    assert_eq!(config.dirs.len(), 3);
    let file = json!({"blob_file": "/x"});
    assert!(Backend::parse("localfs", &file).is_ok());
    assert!(Backend::parse("localfs", &json!({})).is_err());
    assert!(Backend::parse("localfs", &json!({"dirs": "/a"})).is_err());
}

#[test]
fn equal_configurations_are_one_backend_and_debug_keeps_secrets() {
    let one = parse(json!({"auth": "dTpzZWNyZXQ="})).unwrap();
    assert_eq!(one, parse(json!({"auth": "dTpzZWNyZXQ=", "timeout": 5})).unwrap());
    assert_ne!(one, parse(json!({})).unwrap());
    assert!(!format!("{one:?}").contains("dTpzZWNyZXQ="));
}

proptest::proptest! {
    #[test]
    fn no_text_breaks_the_parser(key in "[a-z_]{1,12}", text in ".{0,30}") {
        let _ = parse(json!({key.clone(): text.clone()}));
        let _ = parse(json!({"host": text.clone(), "repo": text.clone()}));
        let _ = parse(json!({"proxy": {"url": text.clone()}, "mirrors": [{"host": text}]}));
    }
}
