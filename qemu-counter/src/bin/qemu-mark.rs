//! Executes the marker, once. Without the plugin it does nothing.

#![allow(unsafe_code, reason = "one instruction that no compiler makes")]

#[path = "../marker.rs"]
mod marker;

use marker::MARKER;
use std::arch::asm;

fn main() {
    // SAFETY: The eight bytes are one instruction that changes neither registers, flags nor memory, and reads none.
    unsafe {
        asm!(
            ".byte {}, {}, {}, {}, {}, {}, {}, {}",
            const MARKER[0],
            const MARKER[1],
            const MARKER[2],
            const MARKER[3],
            const MARKER[4],
            const MARKER[5],
            const MARKER[6],
            const MARKER[7],
            options(nomem, nostack, preserves_flags),
        );
    }
}
