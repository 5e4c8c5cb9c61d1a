//! What container engines plug in: Docker's graphdriver.
//!
//! This room knows neither the daemon nor the command line: that a lazily loaded image is mounted
//! and unmounted is done by functions it is handed.

pub mod beneath;
pub mod changes;
pub mod docker;
pub mod docker_http;
pub mod docker_image;
pub mod docker_origin;
pub mod docker_server;
pub mod driver;
pub mod driver_images;
pub mod layers;
pub mod overlay;
pub mod pack;
pub mod stack;
pub mod tar;
pub mod tar_read;
pub mod unpack;

#[cfg(test)]
mod docker_tests;
#[cfg(test)]
mod driver_tests;
#[cfg(test)]
mod layer_tests;
#[cfg(test)]
mod tar_read_tests;
