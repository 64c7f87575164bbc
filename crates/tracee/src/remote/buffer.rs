//! What a batch of calls is written to the blob from, and read back into.

use unbroken_sys::remote_code::{ENTRY_BYTES, SCRATCH, SCRATCH_BYTES, TABLE};

/// A local copy of the blob's data, kept by the tree from batch to batch.
pub(crate) struct BatchBuffer {
    pub data: Vec<u8>,
    pub calls: usize,
    pub scratch: usize,
}

impl Default for BatchBuffer {
    fn default() -> Self {
        BatchBuffer {
            data: vec![0; SCRATCH + SCRATCH_BYTES],
            calls: 0,
            scratch: 0,
        }
    }
}

impl BatchBuffer {
    pub fn word(&self, offset: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.data[offset..offset + 8]);
        u64::from_le_bytes(bytes)
    }

    pub fn set_word(&mut self, offset: usize, value: u64) {
        self.data[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn table_end(&self) -> usize {
        TABLE + self.calls * ENTRY_BYTES
    }
}
