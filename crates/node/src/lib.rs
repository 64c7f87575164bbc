#![forbid(unsafe_code)]

pub mod board;
pub mod control;
pub mod directory;
pub mod notify;
pub mod publish;
#[cfg(test)]
mod test_root;
