//! What is known about images and blobs, and who fetches what, in which order.

pub mod catalog;
pub mod journal;
pub mod registration;
pub mod statistics;
