//! The encoding of everything but page content, which travels raw beside it.

use serde::{Serialize, de::DeserializeOwned};

/// Bytes that are no encoding of what was asked for: cut off, of another version, or damaged.
#[derive(Debug, thiserror::Error)]
#[error("decode {what}: {source}; the two sides run different versions, or the link is damaged")]
pub struct DecodeError {
    what: &'static str,
    source: postcard::Error,
}

/// Appends the encoding of `value` to `buffer`, whose capacity is kept from epoch to epoch.
pub fn encode_into<T: Serialize>(value: &T, buffer: &mut Vec<u8>) {
    let taken = std::mem::take(buffer);
    // Encoding into a growing Vec fails only for types that postcard cannot represent
    // (sequences of unknown length), and the image has none.
    *buffer = postcard::to_extend(value, taken).expect("every image type has a known length");
}

/// Reads one `T` from all of `bytes`.
pub fn decode<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, DecodeError> {
    postcard::from_bytes(bytes).map_err(|source| DecodeError { what, source })
}
