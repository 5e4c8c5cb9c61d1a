//! Little-endian fields at fixed offsets of a record.
//!
//! Callers pass a slice whose length they have checked against the record's size: an offset past
//! its end is a bug of ours, never a matter of input, and panics.

/// The `N` bytes at `offset`.
pub(super) fn bytes_at<const N: usize>(record: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&record[offset..offset + N]);
    field
}

/// The 16-bit field at `offset`.
pub(super) fn u16_at(record: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(bytes_at(record, offset))
}

/// The 32-bit field at `offset`.
pub(super) fn u32_at(record: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes_at(record, offset))
}

/// The 64-bit field at `offset`.
pub(super) fn u64_at(record: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes_at(record, offset))
}

/// Puts a field at `offset`.
pub(super) fn put(record: &mut [u8], offset: usize, field: &[u8]) {
    record[offset..offset + field.len()].copy_from_slice(field);
}
