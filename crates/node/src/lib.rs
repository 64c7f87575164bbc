#![forbid(unsafe_code)]

pub mod board;
pub mod directory;
#[cfg(test)]
mod test_root;
