#![forbid(unsafe_code)]

pub mod board;
pub mod control;
pub mod directory;
pub mod notify;
#[cfg(test)]
mod test_root;
