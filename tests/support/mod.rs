//! What several test programs start or speak to. Each takes what it needs, so not all of it is used
//! in each: that is what the `allow` is for. Whatever is started here ends when it is dropped.
#![allow(dead_code, missing_docs)]

pub mod built;
pub mod counting;
pub mod daemon;
pub mod distribution;
pub mod fuzzing;
pub mod http;
pub mod image;
pub mod kernel;
pub mod layouts;
pub mod listener;
pub mod node;
pub mod program;
pub mod registry;
pub mod segments;
pub mod supervisor;
pub mod synthetic;
pub mod tree;
pub mod truth;
