//! Sequences of requests that lead somewhere, drawn from a seed.

use super::{request::Request, rng::Rng, workload::SECTORS};

/// Two to four lanes whose requests are all within a few sectors.
pub(super) fn meeting(rng: &mut Rng) -> Vec<Vec<Request>> {
    let window = 2 + rng.below(8) as usize;
    let anywhere = rng.below((SECTORS - window) as u64) as usize;
    let first = [6, 252, SECTORS - window, anywhere][rng.below(4) as usize];
    let request = |rng: &mut Rng| {
        let at = first + rng.below(window as u64) as usize;
        let count = 1 + rng.below((first + window - at) as u64) as usize;
        match rng.below(12) {
            0..=5 => Request::Write(at, count),
            6 => Request::Read(first, window),
            7 => Request::Zero(at, count, rng.below(2) == 0),
            8..=9 => Request::Discard(first, window),
            10 => Request::Flush,
            _ => Request::Maintain,
        }
    };
    let lane = |rng: &mut Rng| (0..1 + rng.below(4)).map(|_| request(rng)).collect();
    (0..2 + rng.below(3)).map(|_| lane(rng)).collect()
}

/// Frees clusters that had data, and then writes where there is no L2 table yet: it is given one of them.
/// (Where they cannot be punched out the data is still there.)
pub(super) fn tables_after_data(rng: &mut Rng) -> Vec<Request> {
    let below_second_table =
        |rng: &mut Rng| Request::Write(rng.below(100) as usize, 18 + rng.below(7) as usize);
    let mut requests = vec![below_second_table(rng), Request::Discard(0, 256)];
    requests.extend([Request::Flush, Request::Maintain, Request::Flush, below_second_table(rng)]);
    requests.extend((0..1 + rng.below(3)).map(|_| small_write(rng)));
    requests.push(Request::Flush);
    requests
}

/// Small writes with a flush after each.
pub(super) fn flushed(rng: &mut Rng) -> Vec<Request> {
    (0..2 + rng.below(5)).flat_map(|_| [small_write(rng), Request::Flush]).collect()
}

/// Writes that take a cluster or two each, so that there may be room for one and not for a whole extent.
pub(super) fn allocating(rng: &mut Rng) -> Vec<Request> {
    (0..3 + rng.below(6)).map(|_| if rng.below(5) == 0 { Request::Flush } else { small_write(rng) }).collect()
}

/// With a flush after each request.
pub(super) fn with_flushes(requests: Vec<Request>) -> Vec<Request> {
    requests.into_iter().flat_map(|request| [request, Request::Flush]).collect()
}

/// Some clusters.
pub(super) fn discard(rng: &mut Rng) -> Request {
    let count = 8 + rng.below(24) as usize;
    Request::Discard(rng.below((SECTORS - count) as u64) as usize, count)
}

/// Gives clusters of several refcount pages back, and takes some of them again.
pub(super) fn freeing(rng: &mut Rng) -> Vec<Request> {
    let mut requests = Vec::new();
    for _ in 0..2 + rng.below(3) {
        requests.extend((0..1 + rng.below(4)).map(|_| discard(rng)));
        requests.extend([Request::Flush, Request::Maintain]);
        requests.extend((0..rng.below(3)).map(|_| small_write(rng)));
    }
    requests.push(Request::Maintain);
    requests
}

/// The same with clusters of nearly all refcount pages at a time: each page is needed again when the others
/// have driven it out.
pub(super) fn freeing_much(rng: &mut Rng) -> Vec<Request> {
    let mut requests = Vec::new();
    for _ in 0..2 + rng.below(2) {
        for _ in 0..2 + rng.below(3) {
            let count = 40 + rng.below(80) as usize;
            requests.push(Request::Discard(rng.below((SECTORS - count) as u64) as usize, count));
        }
        requests.extend([Request::Flush, Request::Maintain]);
    }
    requests.push(Request::Maintain);
    requests
}

/// Changes every entry, with no flush between.
pub(super) fn changing_all(rng: &mut Rng) -> Vec<Request> {
    let change = |rng: &mut Rng| match rng.below(3) {
        0 => Request::Discard(0, SECTORS),
        1 => Request::Zero(0, SECTORS, rng.below(2) == 0),
        _ => Request::Write(0, SECTORS),
    };
    (0..1 + rng.below(2)).map(|_| change(rng)).collect()
}

/// Lanes that change the entries of a slice each, all at once, and then all of them again: the log is full before a
/// cut has made room, as none of them needs a cluster.
pub(super) fn filling() -> Vec<Vec<Request>> {
    let slices = || (0..SECTORS).step_by(64).map(|at| (at, 64.min(SECTORS - at)));
    let zeros = slices().map(|(at, count)| vec![Request::Zero(at, count, true)]);
    zeros.chain(slices().map(|(at, count)| vec![Request::Discard(at, count)])).collect()
}

/// Writes that reach into two L2 tables, or nearly: both are copied at the same time.
pub(super) fn crossing(rng: &mut Rng) -> Vec<Request> {
    let write = |rng: &mut Rng| {
        let table = [64, 128, 256, 512][rng.below(4) as usize];
        Request::Write(table - 1 - rng.below(6) as usize, 2 + rng.below(5) as usize)
    };
    (0..2 + rng.below(6)).map(|_| if rng.below(6) == 0 { Request::Flush } else { write(rng) }).collect()
}

/// A few requests of the alphabet.
pub(super) fn short(rng: &mut Rng) -> Vec<Request> {
    let len = 1 + rng.below(3);
    (0..len).map(|_| Request::ALPHABET[rng.below(Request::ALPHABET.len() as u64) as usize]).collect()
}

pub(super) fn random(rng: &mut Rng, max: u64) -> Vec<Request> {
    (0..1 + rng.below(max)).map(|_| Request::random(rng)).collect()
}

/// More than one extent's worth of clusters.
pub(super) fn long_write(rng: &mut Rng) -> Request {
    let count = 18 + rng.below(7) as usize;
    Request::Write(rng.below((SECTORS - count) as u64) as usize, count)
}

/// Lanes that need new extents all the time.
pub(super) fn writers(rng: &mut Rng) -> Vec<Vec<Request>> {
    let lanes = 2 + rng.below(2);
    (0..lanes).map(|_| (0..1 + rng.below(4)).map(|_| long_write(rng)).collect()).collect()
}

/// Requests that use clusters which [`churn`] frees.
pub(super) fn touches(rng: &mut Rng, count: usize) -> Vec<Request> {
    let touch = |rng: &mut Rng| {
        let at = 6 + rng.below(4) as usize;
        if rng.below(2) == 0 { Request::Write(at, 2) } else { Request::Read(at, 2) }
    };
    (0..count).map(|_| touch(rng)).collect()
}

/// Frees clusters of two places, and writes to one of them: that is given the other's.
pub(super) fn churn(rng: &mut Rng) -> Vec<Request> {
    let elsewhere = 20 + 40 * rng.below(8) as usize;
    // Enough for all that one cluster holds, compressed.
    let all = if rng.below(2) == 0 { 20 } else { 160 };
    // The mapping is in memory then.
    let mut requests = vec![Request::Read(4, 10), Request::Read(elsewhere, 20)];
    let kind = rng.below(4);
    if kind == 3 {
        // Three cuts' worth, of which two make one batch.
        for (at, count) in [(elsewhere, 20), (4, 10), (400, 10)] {
            requests.extend([Request::Discard(at, count), Request::Flush]);
        }
        requests.push(Request::Maintain);
    } else if kind == 0 {
        // Of many each begins an epoch: requests of the very one in which they go may use one that goes alone.
        let alone = Request::Discard(8, [1, 2, 8][rng.below(3) as usize]);
        let gives_back = [Request::Flush, Request::Maintain];
        requests.push(Request::Discard(elsewhere, all));
        requests.extend(gives_back);
        requests.push(alone);
        requests.extend(gives_back);
    } else {
        requests.extend([Request::Discard(4, 10), Request::Discard(elsewhere, all)]);
        requests.extend([Request::Flush, Request::Maintain]);
    }
    requests.extend([Request::Write(elsewhere, 20), Request::Flush]);
    requests
}

/// Lanes that write single sectors of the same few clusters.
pub(super) fn sharing(rng: &mut Rng) -> Vec<Vec<Request>> {
    let first = 8 * rng.below(SECTORS as u64 / 8) as usize;
    let lane = |rng: &mut Rng| {
        (0..2 + rng.below(4)).map(|_| Request::Write(first + rng.below(8) as usize, 1)).collect()
    };
    (0..3).map(|_| lane(rng)).collect()
}

/// Frees clusters, gives them back, or finds that they have leaked, and uses them again.
pub(super) fn recycling(rng: &mut Rng) -> Vec<Request> {
    let mut requests = Vec::new();
    for _ in 0..2 + rng.below(3) {
        requests.extend([discard(rng), Request::Flush, Request::Maintain]);
        if rng.below(3) == 0 {
            requests.push(Request::Reclaim(1 << 20));
        }
        requests.extend((0..1 + rng.below(2)).map(|_| long_write(rng)));
    }
    requests
}

/// Uses some extents up, and then writes parts of clusters.
pub(super) fn using_up(rng: &mut Rng) -> Vec<Request> {
    let mut requests: Vec<_> = (0..rng.below(3)).map(|_| long_write(rng)).collect();
    for _ in 0..3 + rng.below(6) {
        // Behind the end of a backing file there are zeros.
        let at = [rng.below(SECTORS as u64 - 4), 427 + rng.below(80)][rng.below(2) as usize] as usize;
        requests.push(Request::Write(at, 1 + rng.below(3) as usize));
    }
    requests
}

fn small_write(rng: &mut Rng) -> Request {
    let count = 1 + rng.below(3) as usize;
    Request::Write(rng.below((SECTORS - count) as u64) as usize, count)
}

/// Requests of which the first makes a full refcount table grow.
pub(super) fn growing(rng: &mut Rng) -> Vec<Request> {
    let mut lane = vec![long_write(rng), long_write(rng)];
    lane.extend(random(rng, 6));
    lane
}

/// A change of the mapping that takes no cluster.
pub(super) fn zeros(rng: &mut Rng) -> Request {
    let count = 1 + rng.below(6) as usize;
    Request::Zero(rng.below(150) as usize, count, rng.below(2) == 0)
}
