//! The way of an image of the matrix through the suite, whoever serves it.
//!
//! Made by QEMU → served: read through, changed at random, read through → detached and judged by
//! QEMU → changed by QEMU → served again, read through, changed → judged again.

use crate::{
    disk::{Disk, Server},
    fixture::{Fixture, Recipe},
    sequence::Player,
};
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// How much work a journey is.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Batches of requests while the image is served.
    pub batches: usize,
    /// How many times QEMU changes the image in between and it is served again.
    pub returns: usize,
}

/// Takes one image through. `dir` is the journey's own, and empty.
///
/// # Errors
/// What went wrong, and where.
pub fn journey(server: &impl Server, dir: &Path, recipe: &Recipe, effort: Effort, seed: u64) -> Result<()> {
    let mut fixture = Fixture::make(dir, recipe, seed).context("making the image")?;
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed);
    let mut player = Player::new(&fixture.mirror, recipe.discards(), seed);
    for round in 0..=effort.returns {
        if round > 0 {
            fixture.scribble(&mut rng).context("qemu-io on an image that we have changed")?;
        }
        let told = || format!("round {round}");
        serve(server, &mut fixture, &mut player, recipe, effort.batches).with_context(told)?;
        fixture.judge().with_context(told)?;
    }
    Ok(())
}

fn serve(
    server: &impl Server,
    fixture: &mut Fixture,
    player: &mut Player,
    recipe: &Recipe,
    batches: usize,
) -> Result<()> {
    let mut disk = server.attach(&fixture.image, recipe.queues).context("attach")?;
    ensure!(disk.size() == recipe.size, "the disk has {} bytes, not {}", disk.size(), recipe.size);
    let mirror = &mut fixture.mirror;
    player.verify(&mut disk, mirror).context("as QEMU left it")?;
    player.play(&mut disk, mirror, batches)?;
    player.verify(&mut disk, mirror).context("after our changes")?;
    disk.detach().context("detach")
}
