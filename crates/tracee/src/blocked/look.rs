//! What has to be asked of the kernel to tell what a thread waits for.

/// What can be asked about the thread's process while it stands.
pub(crate) trait Look {
    fn now_ns(&mut self) -> u64;
    /// Reads memory; false when it is not there.
    fn read(&mut self, address: u64, bytes: &mut [u8]) -> bool;
    /// When the wait of at most `left_ns` that this stop has broken off would have ended, if the
    /// kernel told.
    fn broken_off_ns(&mut self, left_ns: u64) -> Option<u64>;
    /// A timeout of the socket at descriptor `fd`; `None` when there is none.
    fn socket_timeout_ns(&mut self, fd: i32, option: i32) -> Option<u64>;
}
