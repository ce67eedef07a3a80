//! The serving process: from an image's path to a device and back.
//!
//! [`run`] reads top to bottom as the life of a server: open the image, make the device or take over
//! one whose server has died, start its queues, start the device, say so, wait, stop, close, delete. Any
//! step that fails undoes the ones before; a device that was to be taken over goes on waiting. This
//! thread commands the driver and serves nothing itself, because the driver's commands wait for requests
//! that the queues serve.

mod error;
mod image;

pub(crate) use error::ServeError;
pub(crate) use image::{Settled, settle};

use crate::{
    config::Config,
    control::Control,
    crew::{self, Crew, End, Service},
    deputy::Deputy,
    device::{self, Device, DeviceError, Shape},
    identity::KnownFile,
    namespace::Namespace,
    orphans,
    processes::Process,
    queue::Search,
    redofile::{self, Witness},
    request::device_sectors,
    runfile::{self, Choice, Making, Phase, Record, RunFile},
    safety,
};
use image::{close_image, keep_new_log, open_image, take_image_over};
use qcow2_engine::{Image, Workers, io::Files};
use std::{
    fs::File,
    io, mem,
    num::NonZero,
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
    time::Duration,
};

/// How long the queues may take to finish their requests, write back and end, once the device has
/// been stopped.
const DRAIN_WAIT: Duration = Duration::from_secs(300);
/// The same when the device could not be stopped, so that they hardly will.
const HOPELESS_DRAIN_WAIT: Duration = Duration::from_secs(5);

/// Threads that decompress clusters at the most; they are started when there is work for them.
const MAX_WORKERS: usize = 8;

/// How a server comes by its device.
#[derive(Clone, Debug)]
pub(crate) enum Start {
    /// It makes one, with this number or one of the driver's choice. Whoever may have to remove it knows it
    /// by the cookie.
    New { id: Option<u32>, config: Config, cookie: u64 },
    /// It takes over one whose server has died.
    Recover { id: u32 },
}

impl Start {
    /// The image that is to be served, as far as anybody knows.
    pub(crate) fn image(&self) -> Option<PathBuf> {
        match self {
            Self::New { config, .. } => Some(config.image.clone()),
            Self::Recover { id } => Some(runfile::load(*id).ok()??.record.config.image),
        }
    }
}

/// Serves an image until a signal ends it. `announce` is called once the device serves I/O; its
/// failure stops a new device again.
pub(crate) fn run(
    start: &Start,
    namespace: Namespace,
    supervisor: Option<Process>,
    announce: impl FnOnce(&Path, u32) -> io::Result<()>,
) -> Result<(), ServeError> {
    safety::prepare();
    // While there is one thread, and nothing that it would keep.
    let deputy = Deputy::fork().map_err(ServeError::SetUp)?;
    let crew = Crew::new().map_err(ServeError::SetUp)?;
    let processes = Process::this().map_err(ServeError::SetUp)?;
    let processes = [processes].into_iter().chain(supervisor).collect();
    let ready = apart(|| match start {
        Start::New { id, config, cookie } => make(*id, config, *cookie, namespace, processes),
        Start::Recover { id } => take_over(*id, namespace, processes),
    })?;
    crew.listen().map_err(ServeError::SetUp)?;
    safety::keep_control();
    serve(ready, crew, deputy, announce)
}

/// Takes a step on a thread that ends with it. So do the kernel's own threads for its I/O, which would
/// keep the privileges that this thread is about to give up.
fn apart<T: Send>(step: impl FnOnce() -> Result<T, ServeError> + Send) -> Result<T, ServeError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("opening".to_owned()).spawn_scoped(scope, step);
        let panicked = |_| Err(ServeError::SetUp(io::Error::other("the thread that opens it panicked")));
        thread.map_err(ServeError::SetUp)?.join().unwrap_or_else(panicked)
    })
}

/// All that has to be there before the queues can start.
struct Ready {
    service: Service,
    device: Device,
    run_file: RunFile,
    /// Of the image, for whoever replays our redo log: to be dropped when nobody here may modify the image
    /// any more.
    witness: Option<Witness>,
}

/// Opens the image and makes a device for it.
fn make(
    id: Option<u32>,
    config: &Config,
    cookie: u64,
    namespace: Namespace,
    processes: Vec<Process>,
) -> Result<Ready, ServeError> {
    let files = Arc::new(config.files());
    let open = || open_image(&config.image, &config.open_options(), &files);
    let image = crew::interruptible(open).map_err(ServeError::SetUp)??;
    let shape = shape_of(&image, config)?;
    let &Config { queues, depth, recovery, part_scan, zero_copy, .. } = config;
    let boot = runfile::boot()?;
    let known = KnownFile::of_chain(&image, &files, config).map_err(ServeError::SetUp)?;
    let request = device::Request { id, queues, depth, recovery, part_scan, zero_copy, cookie };
    // In this order, so that a device goes before its record does, should anything fail from here on.
    let (run_file, mut device) = add_device(&request, |device| Record {
        id: device.id(),
        pid: process::id().cast_signed(),
        size: shape.sectors * 512,
        queues: device.queues(),
        depth: device.depth(),
        phase: Phase::Preparing,
        is_inherited: false,
        config: Config { recovery: device.is_recoverable(), ..config.clone() },
        cookie,
        processes: processes.clone(),
        files: known.clone(),
        boot: boot.clone(),
        invocation: runfile::invocation(),
        error: None,
        is_ending: false,
        refusal: None,
    })?;
    if !config.force_share {
        runfile::refuse_clashes(config, &files.paths(), cookie)?;
    }
    device.describe(&shape)?;
    let witness = keep_new_log(&device, &image, config)?;
    let service = service(image, files, device.open_char()?, Search::Later.if_wanted(config));
    keep_ways(namespace, &service);
    Ok(Ready { service, device, run_file, witness })
}

/// Adds a device and writes its record. The driver gives out every number that is free; one whose last server
/// has left something to be written to its image, or may have, or is writing it, is kept until there is another,
/// unless it was asked for.
fn add_device(
    request: &device::Request,
    record: impl Fn(&Device) -> Record,
) -> Result<(RunFile, Device), ServeError> {
    let choice = if request.id.is_some() { Choice::AskedFor } else { Choice::Any };
    if let Err(error) = orphans::remove_all() {
        tracing::warn!("a device without a record stays: {error}");
    }
    let _making = Making::begin()?;
    let mut passed_over = Vec::new();
    loop {
        let device = Device::add(Control::open()?, request)?;
        match RunFile::create(record(&device), choice, redofile::owes) {
            Ok(run_file) => return Ok((run_file, device)),
            Err(error) if choice == Choice::Any && error.is_of_number() => {
                tracing::warn!("another number is taken: {error}");
                passed_over.push(device);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes a device over whose server has died. Whatever fails, the device goes on waiting, and so it does if this is
/// interrupted.
fn take_over(id: u32, namespace: Namespace, processes: Vec<Process>) -> Result<Ready, ServeError> {
    let mut run_file = RunFile::take_over(id)?;
    run_file.name(processes);
    match take_over_as(&mut run_file, namespace) {
        Ok((service, device, witness)) => Ok(Ready { service, device, run_file, witness }),
        Err(error) => {
            run_file.leave();
            Err(error)
        }
    }
}

fn take_over_as(
    run_file: &mut RunFile,
    namespace: Namespace,
) -> Result<(Service, Device, Option<Witness>), ServeError> {
    let record = run_file.record().clone();
    let (id, config) = (record.id, &record.config);
    // Our copies of its mounts would keep its file system mounted when everybody else has unmounted it.
    namespace.let_go_of(&format!("ublkb{id}"));
    let control = Control::open()?;
    let recover = || Device::recover(control, id, record.cookie, record.phase);
    let device = crew::interruptible(recover).map_err(ServeError::SetUp)??;
    run_file.enter(Phase::Preparing)?;
    // When this succeeds the old server's I/O has ended.
    let char_device = device.open_char()?;
    let files = Arc::new(config.files());
    let (image, witness) = take_image_over(&record, &device, &files)?;
    let service = service(image, files, char_device, Search::AtOnce.if_wanted(config));
    keep_ways(namespace, &service);
    Ok((service, device, witness))
}

/// From now on no other file system is kept busy than those that this server and its successors need.
fn keep_ways(namespace: Namespace, service: &Service) {
    let mut needed = service.files.paths();
    needed.push(runfile::directory());
    namespace.keep_ways_to(&needed);
}

fn service(image: Arc<Image>, files: Arc<Files>, char_device: File, search: Search) -> Service {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    image.decompress_with(Workers::new(processors.min(MAX_WORKERS)));
    Service { image, files, char_device: Arc::new(char_device), search }
}

/// Has the queues serve the device, until the end.
fn serve(
    ready: Ready,
    mut crew: Crew,
    mut deputy: Deputy,
    announce: impl FnOnce(&Path, u32) -> io::Result<()>,
) -> Result<(), ServeError> {
    let Ready { service, mut device, mut run_file, witness } = ready;
    let was_in_use = device.is_waiting();
    let started = crew.bring_up(&service, &mut device, &mut run_file, &mut deputy, announce);
    let is_announced = started.is_ok();
    let ended = started.and_then(|()| {
        crew.rest(safety::LEISURE);
        safety::hold_program();
        attend(&mut crew, &device, &mut run_file, &mut deputy)
    });
    let (served, written) = match ended {
        Ok(written) => (Ok(()), written),
        Err(error) => (Err(error), Ok(())),
    };
    if device.is_waiting() {
        // Its users go on waiting as well, for another attempt.
        run_file.leave();
        return Err(served.err().unwrap_or(ServeError::QueueFailed));
    }
    if let (Err(ServeError::QueueFailed), true) = (&served, device.is_started())
        && let Some(failure) = crew.take_failure()
    {
        match farewell(is_announced, was_in_use) {
            Farewell::Die => die(&device, run_file, &failure),
            Farewell::Report => {
                mem::forget((device, witness));
                run_file.leave();
                return Err(failure);
            }
        }
    }
    let (result, rest) = wind_up(served, written, service, device, crew, deputy, witness);
    match (&result, rest) {
        // Before the announcement the one who waits for it learns of the error; after, `del` does.
        (Err(error), _) if is_announced => run_file.fail(error.to_string()),
        (_, Rest::Device) => run_file.leave(),
        _ => {}
    }
    result
}

/// Waits for the end of a service, and has the kernel write back before its device is stopped, when those on it have;
/// tells whether it could.
fn attend(
    crew: &mut Crew,
    device: &Device,
    run_file: &mut RunFile,
    deputy: &mut Deputy,
) -> Result<Result<(), ServeError>, ServeError> {
    let id = device.id();
    let note = |turn: Turn<'_>| match turn {
        Turn::Ending => {
            if let Err(error) = run_file.begin_end() {
                tracing::warn!(id, "the server of a device below does not wait for this one: {error}");
            }
        }
        Turn::GoesOn(error) => {
            tracing::error!(
                id,
                "{error}: the device goes on, and nothing is lost; `ublk-qcow2 del --force -n {id}` ends it"
            );
            if let Err(error) = run_file.refuse(error.to_string()) {
                tracing::error!(id, "who has asked for the end does not learn of that: {error}");
            }
        }
    };
    let write_back = |end| {
        if end == End::Asked {
            device.await_upper(deputy)?;
        }
        device.write_back(deputy)
    };
    until_the_end(|| crew.wait_for_end(), write_back, note, id)
}

/// What others are to know of a server that was asked to end.
enum Turn<'a> {
    Ending,
    GoesOn(&'a DeviceError),
}

/// A device that is asked to go stays if the kernel does not get done with what it has in memory for it, or cannot
/// begin, or one that was to go before it stays: something would be lost.
fn until_the_end(
    mut wait: impl FnMut() -> Result<End, ServeError>,
    mut write_back: impl FnMut(End) -> Result<(), DeviceError>,
    mut note: impl FnMut(Turn<'_>),
    id: u32,
) -> Result<Result<(), ServeError>, ServeError> {
    loop {
        let end = wait()?;
        if end == End::Stopped {
            tracing::warn!(
                id,
                "stopped by another program; what the kernel still had to write to the device is lost"
            );
            return Ok(Ok(()));
        }
        note(Turn::Ending);
        match write_back(end) {
            Err(error) if end == End::Asked && error.is_unfinished() => note(Turn::GoesOn(&error)),
            written => return Ok(written.map_err(ServeError::from)),
        }
    }
}

/// What there still is when a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Nothing,
    /// The device, which could not be stopped: whoever reads the record removes it.
    Device,
}

/// Stops the device, closes the image and deletes the device.
fn wind_up(
    served: Result<(), ServeError>,
    written: Result<(), ServeError>,
    service: Service,
    mut device: Device,
    crew: Crew,
    mut deputy: Deputy,
    witness: Option<Witness>,
) -> (Result<(), ServeError>, Rest) {
    let stopped = device.stop(&mut deputy).map_err(ServeError::from);
    let drained = crew.drain(if stopped.is_ok() { DRAIN_WAIT } else { HOPELESS_DRAIN_WAIT });
    let Service { image, files, char_device, search } = service;
    // While a queue may still write the image cannot be closed; it is then as after a crash.
    let closed = if drained.is_ok() {
        let closed = close_image(&image, &files, search);
        drop(witness);
        closed
    } else {
        Ok(())
    };
    // The driver deletes a device when nobody has it open.
    drop((image, files, char_device));
    let (deleted, rest) = if stopped.is_ok() {
        (device.delete().map_err(ServeError::from), Rest::Nothing)
    } else {
        mem::forget(device);
        (Ok(()), Rest::Device)
    };
    // Before the record goes: then nothing of this server is to be left that sees its image's file
    // system.
    drop(deputy);
    // A failed queue is the cause of whatever else went wrong.
    (drained.and(served).and(closed).and(written).and(stopped).and(deleted), rest)
}

/// How a server ends one of whose queues has failed while its device was started. The device is not stopped
/// before: the driver would wait for the requests that the queue has, and (Linux 6.15) fails them only when
/// we have let go of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Farewell {
    /// It ends there and then: the device has users.
    Die,
    /// Who waits for the announcement hears why there is none, and removes the device when this process is
    /// gone.
    Report,
}

fn farewell(is_announced: bool, was_in_use: bool) -> Farewell {
    if is_announced || was_in_use { Farewell::Die } else { Farewell::Report }
}

/// Ends this process. A device for recovery is taken over, another one is stopped by the driver.
fn die(device: &Device, run_file: RunFile, error: &ServeError) -> ! {
    tracing::error!(id = device.id(), "{error}; the server ends");
    if device.is_recoverable() {
        process::abort();
    }
    run_file.fail(error.to_string());
    process::exit(1)
}

fn shape_of(image: &Image, config: &Config) -> Result<Shape, ServeError> {
    let sectors = device_sectors(image.virtual_size());
    if sectors == 0 {
        return Err(ServeError::Empty(config.image.clone()));
    }
    Ok(Shape {
        sectors,
        // At most 2 MiB.
        cluster_bytes: image.geometry().cluster_size() as u32,
        read_only: image.is_read_only(),
        can_discard: image.can_discard(),
        has_zero_clusters: image.has_zero_clusters(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue of a new device failed after START_DEV and before `add` was told: the server stopped the
    /// device itself, which waits for the queue's requests, and `add` waited for the server.
    #[test]
    fn a_server_whose_queue_fails_before_anybody_knows_its_device_says_so_and_goes() {
        assert_eq!(farewell(false, false), Farewell::Report);
        for (is_announced, was_in_use) in [(true, false), (false, true), (true, true)] {
            assert_eq!(farewell(is_announced, was_in_use), Farewell::Die);
        }
    }

    /// The image's disk was slow: what lay in the kernel's memory for the device was not written in time, and the
    /// device was stopped all the same, which lost it. So it was when there was no thread to begin with it.
    #[test]
    fn a_device_stays_that_is_not_written_back_in_time_unless_it_is_to_go_all_the_same() {
        let late = || Err(DeviceError::Late { path: PathBuf::new(), limit: Duration::ZERO });
        let not_begun = || {
            let source = io::ErrorKind::WouldBlock.into();
            Err(DeviceError::NotBegun { path: PathBuf::new(), source })
        };
        let failed = || Err(DeviceError::PartScan);
        let ended = |ends: &[End], outcomes: Vec<Result<(), DeviceError>>| {
            let (mut ends, mut outcomes) = (ends.iter(), outcomes.into_iter());
            let mut stayed = 0;
            let wait = || ends.next().copied().ok_or(ServeError::QueueFailed);
            let note = |turn: Turn<'_>| stayed += u32::from(matches!(turn, Turn::GoesOn(_)));
            let written = until_the_end(wait, |_| outcomes.next().unwrap(), note, 7);
            (written.map(|written| written.is_ok()).ok(), stayed)
        };
        assert_eq!(ended(&[End::Asked], vec![Ok(())]), (Some(true), 0));
        assert_eq!(ended(&[End::Asked, End::Asked], vec![late(), Ok(())]), (Some(true), 1));
        assert_eq!(ended(&[End::Asked, End::Forced], vec![late(), late()]), (Some(false), 1));
        assert_eq!(ended(&[End::Asked], vec![late()]), (None, 1), "it goes on, and a queue fails");
        assert_eq!(ended(&[End::Asked, End::Forced], vec![not_begun(), not_begun()]), (Some(false), 1));
        assert_eq!(ended(&[End::Asked], vec![failed()]), (Some(false), 0), "that is lost in any case");
        assert_eq!(ended(&[End::Stopped], vec![]), (Some(true), 0));
    }
}
