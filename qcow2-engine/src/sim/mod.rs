//! The crash simulator: a disk that can lose what was not made durable, and the proof that nothing
//! that was promised is lost with it.
//!
//! [`disk`] is an [`Io`](crate::io::Io) whose operations complete in an order that a seed chooses, on a
//! [`mod@file`] with a volatile cache, or fail as [`faults`] says; [`contents`] are its bytes. [`states`]
//! enumerates what a crash at one moment may leave on such a disk. [`oracle`] reads a crashed image with
//! nothing but the format crate and says what is wrong with it. [`model`] knows which contents each sector
//! may have. [`workload`] makes images (`mixed`, `chain` and `wide` those of some kinds, `age` those that have
//! been through something), `play` carries [`request`]s out; `kill` ends the process and not the machine;
//! [`tools`] has crashes while a tool is at work, on an image with [`damage`], and `counts` says whether that
//! got worse; a [`wound`] is met by requests; `verdict` is what a state is held against; [`cases`] draws images
//! and requests from a seed, each aimed at something (`plan`, `lanes`, `sequences`, `hardship`); [`run`] lives
//! one [`case`] through, with its `tasks`; [`campaign`] runs many, counts, and shrinks what fails, in processes
//! that may die of it ([`apart`]).

mod age;
pub mod apart;
pub mod campaign;
pub mod case;
pub mod cases;
mod chain;
pub mod contents;
mod counts;
pub mod damage;
pub mod disk;
pub mod faults;
pub mod file;
mod hardship;
mod kill;
mod lanes;
mod memory;
mod mixed;
pub mod model;
pub mod oracle;
mod plan;
mod play;
pub mod request;
pub mod rng;
pub mod run;
mod sequences;
pub mod states;
mod tasks;
pub mod tools;
mod verdict;
mod wide;
pub mod workload;
pub mod wound;
