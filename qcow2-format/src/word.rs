//! The words of tables: numbers of eight bytes, the most significant first.
//!
//! This is where the byte order ends. What a word means is for the decoder of its kind to say; structures with
//! fields of several widths have layouts of their own.

use crate::geometry::TABLE_ENTRY_BYTES;

/// Bytes of a word.
const BYTES: usize = TABLE_ENTRY_BYTES as usize;

/// The word that begins at byte `at`; `None` where the bytes end before it does.
#[inline]
#[must_use]
pub fn get(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|word| u64::from_be_bytes(*word))
}

/// Writes the word that begins at byte `at`. That the bytes hold it is for the caller to know; a slice index
/// panics where they do not.
#[inline]
pub fn set(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..][..BYTES].copy_from_slice(&word.to_be_bytes());
}

/// The words of a table.
pub fn all(table: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    table.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word))
}

/// The table of these words.
#[must_use]
pub fn to_bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back_and_end_with_the_bytes() {
        let mut table = to_bytes([1, 2 << 56, u64::MAX]);
        assert_eq!(table[..9], [0, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(all(&table).collect::<Vec<_>>(), [1, 2 << 56, u64::MAX]);
        set(&mut table, 3, 7);
        assert_eq!(
            [0, 3, 16, 17, 24, 25].map(|at| get(&table, at)),
            [Some(0), Some(7), Some(u64::MAX), None, None, None]
        );
        assert_eq!(all(&table[..15]).len(), 1);
    }
}
