//! What happens when a change meets damage of the image's own structures.
//!
//! ```text
//! entry about to be written to, freed or replaced ── Territory ──► conflict: the request fails (EIO)
//!     │                                                             ├─► the corrupt bit is set, durably
//!     ▼ sound                                                       └─► no more changes; reads go on
//! ```
//!
//! What was acknowledged before can still be flushed: its metadata goes to places that were checked.
//! Nothing is freed any more. An image of version 2 has no bit to set.

use crate::{
    error::{Error, Result},
    image::Image,
    io::Io,
    lane::Lane,
    order::rules::Page,
    territory::Conflict,
};
use qcow2_format::{HostOffset, Version, header};
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

/// The damage that has been found, and whether it has been told.
#[derive(Default)]
pub(crate) struct Damage {
    found: OnceLock<Error>,
    is_marked: AtomicBool,
}

impl Damage {
    /// The mark that an image had when it was opened: it is condemned already.
    pub(crate) fn marked(mark: Error) -> Self {
        tracing::warn!("{mark}");
        Self { found: OnceLock::from(mark), is_marked: AtomicBool::new(true) }
    }

    /// The first table that was seen at open to lie where it cannot. It counts when something is about to be
    /// changed.
    pub(crate) fn seen(damage: Option<Error>) -> Self {
        let found = OnceLock::new();
        if let Some(error) = damage {
            tracing::warn!("{error}: the image cannot be written to until it is repaired");
            let _ = found.set(error);
        }
        Self { found, is_marked: AtomicBool::new(false) }
    }

    /// Whether the image may be changed.
    ///
    /// # Errors
    /// The damage; once the image is marked, that it is.
    pub(crate) fn check(&self, file: &Arc<str>) -> Result<()> {
        match self.found.get() {
            None => Ok(()),
            Some(error) if !self.is_condemned() => Err(error.clone()),
            Some(error) => Err(Error::Condemned { file: Arc::clone(file), cause: error.to_string().into() }),
        }
    }

    pub(crate) fn is_condemned(&self) -> bool {
        self.is_marked.load(Ordering::Acquire)
    }

    /// Says whether the caller is the first.
    fn condemn(&self, error: &Error) -> bool {
        let _ = self.found.set(error.clone());
        !self.is_marked.swap(true, Ordering::AcqRel)
    }
}

impl Image {
    /// Checks the cluster that an L2 entry names before something is written to it.
    #[inline]
    pub(crate) fn check_target(&self, host: HostOffset, guest: u64) -> Result<()> {
        if self.is_suspect(host) { self.look_closer(host, guest) } else { Ok(()) }
    }

    /// Whether a cluster may be no place for data. A "no" is certain.
    #[inline]
    pub(crate) fn is_suspect(&self, host: HostOffset) -> bool {
        self.sieve.suspects(self.geometry().host_cluster(host))
    }

    #[cold]
    fn look_closer(&self, host: HostOffset, guest: u64) -> Result<()> {
        let conflict = self.meta.lock().territory.conflict(self.geometry().host_cluster(host));
        conflict.map_or(Ok(()), |conflict| Err(self.conflict("L2", guest, host, conflict)))
    }

    pub(crate) fn conflict(
        &self,
        table: &'static str,
        at: u64,
        host: HostOffset,
        conflict: Conflict,
    ) -> Error {
        Error::Conflict { file: Arc::clone(&self.top().name), table, at, host: host.0, conflict }
    }
}

impl<I: Io> Lane<I> {
    /// The end of every operation that changes an image: damage that it has met condemns the image.
    pub(crate) async fn settle<T>(&self, outcome: Result<T>) -> Result<T> {
        if let Err(error) = &outcome
            && error.condemns(&self.image().top().name)
        {
            Box::pin(self.condemn(error)).await;
        }
        outcome
    }

    async fn condemn(&self, error: &Error) {
        let image = self.image();
        if !image.damage.condemn(error) {
            return;
        }
        tracing::error!(
            "{error}: the image is damaged and not changed any more; detach it and run check --repair all"
        );
        if image.geometry().version == Version::V2 {
            return;
        }
        {
            let mut meta = image.meta.lock();
            let at = header::INCOMPATIBLE_OFFSET as usize;
            let features = meta.header.u64(at) | header::CORRUPT;
            meta.header.set_u64(at, features);
            meta.graph.touch(Page::Header);
        }
        if let Err(error) = self.write_back().await {
            tracing::error!("the corrupt bit could not be set: {error}; the next flush tries again");
        }
    }
}
