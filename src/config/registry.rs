//! Limits of the registry client: connections, heads, redirects, retries, tokens, credentials.

use super::*;

/// Demand requests in flight per core and origin; background ones can never take these places.
pub const REGISTRY_DEMAND_CONNECTION_COUNT_MAX: usize = 16;
/// Background requests in flight per core and origin.
pub const REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX: usize = 12;
/// Idle connections kept per core and origin: every connection may rest.
pub const REGISTRY_IDLE_CONNECTION_COUNT_MAX: usize =
    REGISTRY_DEMAND_CONNECTION_COUNT_MAX + REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX;
/// An idle connection older than this is closed: load balancers drop theirs after a minute.
pub const REGISTRY_IDLE_LIFE_NS: u64 = 30 * SECOND_NS;
/// Origins a core keeps lines to; past it the lines without a connection are forgotten.
pub const REGISTRY_LINE_COUNT_MAX: usize = 64;
/// How often a core looks after its idle connections, tokens and mirrors.
pub const REGISTRY_MAINTAIN_INTERVAL_NS: u64 = SECOND_NS;

/// Connections dialled ahead when an image is registered.
pub const REGISTRY_WARM_CONNECTION_COUNT: usize = 2;
/// A core forgets a route it has not used for this long.
pub const REGISTRY_WAY_LIFE_NS: u64 = 600 * SECOND_NS;
/// Tokens of a route that was not used for this long are not renewed ahead.
pub const TOKEN_RENEWAL_PAUSE_NS: u64 = 300 * SECOND_NS;

/// A request head that does not fit here is refused: signed storage URLs stay below 4 KiB.
pub const HTTP_REQUEST_HEAD_SIZE_MAX: usize = 16 * KIB;
/// A response head that does not fit here is refused.
pub const HTTP_RESPONSE_HEAD_SIZE_MAX: usize = 16 * KIB;
/// Header lines in a response head.
pub const HTTP_HEADER_COUNT_MAX: usize = 64;
/// Interim (1xx) responses passed over before the final one.
pub const HTTP_INTERIM_COUNT_MAX: usize = 4;
/// Bytes asked for while the head is awaited: what comes with the head is copied once more.
pub const HTTP_HEAD_RECEIVE_SIZE: usize = 4 * KIB;
/// A chunk-size line with its extensions, and each trailer line.
pub const HTTP_CHUNK_LINE_SIZE_MAX: usize = 256;
/// Trailer bytes after the last chunk.
pub const HTTP_TRAILER_SIZE_MAX: usize = 4 * KIB;
/// Bytes that must arrive within one `timeout` of the backend, or a body counts as stalled.
pub const HTTP_BODY_PROGRESS_SIZE_MIN: usize = 4 * KIB;
/// The body of an answer that is not the one asked for: read this far for its text.
pub const HTTP_ERROR_BODY_SIZE_MAX: usize = 4 * KIB;

/// Redirects followed for one request.
pub const REGISTRY_REDIRECT_COUNT_MAX: usize = 5;
/// Cached redirects per core.
pub const REGISTRY_REDIRECT_CACHE_COUNT_MAX: usize = 256;
/// A redirect without an expiry of its own is believed this long.
pub const REGISTRY_REDIRECT_LIFE_DEFAULT_NS: u64 = 60 * SECOND_NS;
/// No redirect is believed longer than this, whatever its query says.
pub const REGISTRY_REDIRECT_LIFE_NS_MAX: u64 = 3600 * SECOND_NS;

/// Tries of one request beyond one per source, at least.
pub const REGISTRY_RETRY_COUNT_MIN: u32 = 3;
/// Tries of one request beyond one per source, whatever retry_limit says.
pub const REGISTRY_RETRY_COUNT_MAX: u32 = 10;
/// The first pause between tries: one failure among many says nothing about the next request.
pub const REGISTRY_RETRY_PAUSE_NS_FIRST: u64 = 4 * MILLISECOND_NS;
/// The second pause between tries; it doubles from there. Of every pause half is random.
pub const REGISTRY_RETRY_PAUSE_NS: u64 = 50 * MILLISECOND_NS;
/// The longest pause between tries that we choose ourselves.
pub const REGISTRY_RETRY_PAUSE_NS_MAX: u64 = 2 * SECOND_NS;
/// No answer is late before this: a busy machine is as slow.
pub const PATIENCE_NS_MIN: u64 = 50 * MILLISECOND_NS;
/// Answers for each request that is repeated because its own is late, and before the first: 5 %
/// more requests at most.
pub const PATIENCE_ANSWERS_PER_REPEAT: u32 = 20;
/// Repetitions that are saved for a bad moment.
pub const PATIENCE_REPEATS_SAVED_MAX: u32 = 10;
/// timeout and connect_timeout in seconds when the backend does not say.
pub const REGISTRY_TIMEOUT_DEFAULT_S: u64 = 5;
/// timeout and connect_timeout in seconds when the backend says 0 (nydus: none).
pub const REGISTRY_TIMEOUT_S_MAX: u64 = 120;
/// Mirrors of one backend.
pub const REGISTRY_MIRROR_COUNT_MAX: usize = 16;
/// Extra header lines of one mirror.
pub const REGISTRY_MIRROR_HEADER_COUNT_MAX: usize = 16;
/// After a failure a source is tried last for this long, even below its failure_limit.
pub const REGISTRY_SUSPECT_NS: u64 = SECOND_NS;
/// One that sent wrong bytes is tried last for this long: damage on a mirror's disk stays.
pub const REGISTRY_DISTRUST_NS: u64 = 30 * SECOND_NS;
/// A source that asks not to be asked (Retry-After) is left alone so long at most: half of what a
/// reader waits, who may thus still be served when a registry says an hour and means a minute.
pub const REGISTRY_REST_NS_MAX: u64 = FAULT_DEADLINE_DEFAULT_MS * MILLISECOND_NS / 2;
/// A ping that takes longer counts as failed.
pub const REGISTRY_PING_TIMEOUT_NS: u64 = 2 * SECOND_NS;

/// A token without expires_in lives this long (the distribution specification's default).
pub const TOKEN_LIFE_DEFAULT_S: u64 = 60;
/// No token is believed longer than this.
pub const TOKEN_LIFE_S_MAX: u64 = 24 * 3600;
/// The answer of a token server.
pub const TOKEN_RESPONSE_SIZE_MAX: usize = 64 * KIB;
/// One token text; it must fit a request head with room for the rest.
pub const TOKEN_SIZE_MAX: usize = 8 * KIB;
/// One token fetch, everything included.
pub const TOKEN_FETCH_TIMEOUT_NS: u64 = 10 * SECOND_NS;
/// How often a core looks whether another core has fetched the token both need.
pub const TOKEN_WAIT_STEP_NS: u64 = 2 * MILLISECOND_NS;
/// A failed token fetch is shared with the cores that waited for it this long.
pub const TOKEN_FAILURE_LIFE_NS: u64 = SECOND_NS / 2;
/// Challenges read from one WWW-Authenticate header.
pub const AUTH_CHALLENGE_COUNT_MAX: usize = 8;

/// A Docker configuration file larger than this is refused.
pub const DOCKER_CONFIG_SIZE_MAX: u64 = MIB as u64;
/// A credential helper that has not answered by then is ended.
pub const CREDENTIAL_HELPER_TIMEOUT_MS: u64 = 5_000;
/// How often is looked whether a credential helper that has said all has ended.
pub const CREDENTIAL_HELPER_END_LOOK_MS: u64 = 2;
/// What a credential helper may print.
pub const CREDENTIAL_HELPER_OUTPUT_SIZE_MAX: u64 = 64 * KIB as u64;

/// A resolved name is used this long before the resolver is asked again.
pub const RESOLVE_LIFE_NS: u64 = 60 * SECOND_NS;
/// A failed resolution is remembered this long, so that a storm asks once.
pub const RESOLVE_FAILURE_LIFE_NS: u64 = SECOND_NS;
/// Addresses of one name that are tried.
pub const RESOLVE_ADDRESS_COUNT_MAX: usize = 4;
/// Names kept resolved.
pub const RESOLVE_NAME_COUNT_MAX: usize = 256;
/// One resolution.
pub const RESOLVE_TIMEOUT_NS: u64 = 5 * SECOND_NS;
/// Who has old addresses waits so long for new ones; most resolvers answer in less.
pub const RESOLVE_RENEWAL_WAIT_NS: u64 = 100 * MILLISECOND_NS;
/// How often is looked whether the answer somebody else asked for has come.
pub const RESOLVE_WAIT_STEP_NS: u64 = 2 * MILLISECOND_NS;

/// Files of localfs backends a core keeps open.
pub const LOCALFS_FILE_COUNT_MAX: usize = 64;
/// One read of a localfs file.
pub const LOCALFS_READ_SIZE_MAX: usize = MIB;

/// An HTTP response head must fit the Wire lease it is received into, beside the request head.
const _: () = assert!(HTTP_REQUEST_HEAD_SIZE_MAX + HTTP_RESPONSE_HEAD_SIZE_MAX <= 64 * KIB);
/// A token must fit its request head with room for path and host.
const _: () = assert!(TOKEN_SIZE_MAX + 4 * KIB <= HTTP_REQUEST_HEAD_SIZE_MAX);
