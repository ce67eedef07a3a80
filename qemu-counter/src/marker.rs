//! The instruction that says "write down what was executed until here": the guest's side and the plugin's read this.

/// A `nop` of eight bytes whose operand, an address that is never used, reads `mark`: no compiler makes it.
pub(crate) const MARKER: [u8; 8] = [0x0f, 0x1f, 0x84, 0x24, b'm', b'a', b'r', b'k'];
