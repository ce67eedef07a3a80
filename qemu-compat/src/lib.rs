//! A kit that holds the real device and the engine against QEMU's own tools.
//!
//! ```text
//! qemu_img, qemu_io   the tools           fixture  an image made by them, with what it holds
//! command             any other program   matrix   which images
//! disk                what a test does    journey  the way of an image through the suite
//! engine | device     who serves          grounds  where the suite's devices have their records
//! sequence, content, mirror               seeded requests and what must come of them
//! fio, fs, kill, refusals, shape          what else a device has to stand
//! data_path, durability                   whether both data paths agree; what of a flush the host's disk gets
//! lifecycle                               whose hands a device is in
//! recovery, leaks, server                 what becomes of a device whose server dies, and of its image
//! stopping                                a device that is stopped by somebody else, or whose server is killed meanwhile
//! stacked                                 devices below loop devices, or below images that are devices
//! unsynced                                what the kernel still has to write to a device that is detached
//! between                                 devices without a server or a record, and who comes to them meanwhile
//! unheard                                 commands and servers of which nobody hears
//! unit                                    what a systemd unit runs
//! barriers                                a host that fails an fdatasync
//! origins                                 images on block devices, grown ones, ones with bitmaps
//! condemned                               what becomes of an image in which damage was met
//! power                                   what a host whose power fails finds
//! patience                                waiting for what has to come
//! suite → report, share, selection        all cases, one line each; what is for one machine of several, what is wanted
//! ```
//!
//! The binary of this package runs everything on real devices; `cargo test` runs the matrix
//! through the engine in one process, which needs no device.

pub mod barriers;
pub mod between;
pub mod command;
pub mod condemned;
pub mod content;
pub mod data_path;
pub mod device;
pub mod disk;
pub mod durability;
pub mod engine;
pub mod fio;
pub mod fixture;
pub mod fs;
pub mod grounds;
pub mod journey;
pub mod kill;
pub mod leaks;
pub mod lifecycle;
pub mod matrix;
pub mod mirror;
pub mod origins;
mod patience;
pub mod power;
pub mod qemu_img;
pub mod qemu_io;
pub mod recovery;
pub mod refusals;
pub mod report;
pub mod selection;
pub mod sequence;
pub mod server;
pub mod shape;
pub mod share;
pub mod stacked;
pub mod stopping;
pub mod suite;
pub mod unheard;
pub mod unit;
pub mod unsynced;
