//! Registers that hold values over a long time, and their control words.
//!
//! # Safety
//! Inline assembly that names every register it changes; the wide vectors are used only where
//! the processor has them.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::is_x86_feature_detected as has;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;

/// What a spinning thread has seen.
#[derive(Debug, Default)]
pub struct Kept {
    pub turns: AtomicU64,
    pub lost: AtomicU64,
}

/// Spins of one turn: long enough that most stops fall inside, short on a busy machine.
const SPINS: u64 = 200_000;

/// A thread that loads all vector registers with values of `seed`, spins, and compares.
pub fn spin(seed: u64) -> Arc<Kept> {
    let kept = Arc::new(Kept::default());
    let told = Arc::clone(&kept);
    std::thread::spawn(move || {
        loop {
            let lost = if has!("avx512f") {
                turn_512(seed)
            } else if has!("avx") {
                turn_256(seed)
            } else {
                turn_128(seed)
            };
            told.lost.fetch_add(lost, Ordering::SeqCst);
            told.turns.fetch_add(1, Ordering::SeqCst);
            // Leaves room for the other threads of a small machine.
            std::thread::sleep(std::time::Duration::from_micros(300));
        }
    });
    kept
}

fn words<const COUNT: usize>(seed: u64) -> [u64; COUNT] {
    std::array::from_fn(|index| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64) << 40)
}

fn count_lost(expected: &[u64], found: &[u64]) -> u64 {
    expected.iter().zip(found).filter(|(a, b)| a != b).count() as u64
}

/// Four of the registers that every x86-64 has, two of x87.
fn turn_128(seed: u64) -> u64 {
    let expected: [u64; 8] = words(seed);
    let mut found = [0u64; 8];
    // SAFETY: loads and stores stay within the two arrays.
    unsafe {
        asm!(
            "movdqu xmm0, [{from}]", "movdqu xmm5, [{from} + 16]",
            "movdqu xmm10, [{from} + 32]", "movdqu xmm15, [{from} + 48]",
            "2:", "pause", "dec {count}", "jnz 2b",
            "movdqu [{to}], xmm0", "movdqu [{to} + 16], xmm5",
            "movdqu [{to} + 32], xmm10", "movdqu [{to} + 48], xmm15",
            from = in(reg) expected.as_ptr(), to = in(reg) found.as_mut_ptr(),
            count = inout(reg) SPINS / 10 => _,
            out("xmm0") _, out("xmm5") _, out("xmm10") _, out("xmm15") _,
        );
    }
    count_lost(&expected, black_box(&found))
}

fn turn_256(seed: u64) -> u64 {
    let expected: [u64; 16] = words(seed);
    let mut found = [0u64; 16];
    // SAFETY: as above, on a processor with AVX.
    unsafe {
        asm!(
            "vmovdqu ymm1, [{from}]", "vmovdqu ymm6, [{from} + 32]",
            "vmovdqu ymm11, [{from} + 64]", "vmovdqu ymm14, [{from} + 96]",
            "2:", "pause", "dec {count}", "jnz 2b",
            "vmovdqu [{to}], ymm1", "vmovdqu [{to} + 32], ymm6",
            "vmovdqu [{to} + 64], ymm11", "vmovdqu [{to} + 96], ymm14",
            "vzeroupper",
            from = in(reg) expected.as_ptr(), to = in(reg) found.as_mut_ptr(),
            count = inout(reg) SPINS / 10 => _,
            out("ymm1") _, out("ymm6") _, out("ymm11") _, out("ymm14") _,
        );
    }
    count_lost(&expected, black_box(&found))
}

/// With a mask register, and one of the upper sixteen.
fn turn_512(seed: u64) -> u64 {
    let expected: [u64; 25] = words(seed);
    let mut found = [0u64; 25];
    // SAFETY: as above, on a processor with AVX-512.
    unsafe {
        asm!(
            "vmovdqu64 zmm2, [{from}]", "vmovdqu64 zmm9, [{from} + 64]",
            "vmovdqu64 zmm27, [{from} + 128]", "kmovw k3, [{from} + 192]",
            "2:", "pause", "dec {count}", "jnz 2b",
            "vmovdqu64 [{to}], zmm2", "vmovdqu64 [{to} + 64], zmm9",
            "vmovdqu64 [{to} + 128], zmm27", "kmovw [{to} + 192], k3",
            "vzeroupper",
            from = in(reg) expected.as_ptr(), to = in(reg) found.as_mut_ptr(),
            count = inout(reg) SPINS / 10 => _,
            out("zmm2") _, out("zmm9") _, out("zmm27") _, out("k3") _,
        );
    }
    // The mask register is 16 bits wide.
    found[24] |= expected[24] & !0xffff;
    turn_128(seed ^ 5) + count_lost(&expected, black_box(&found))
}

/// MXCSR and the x87 control word: both round up, everything masked, and x87 with 53 bits.
pub const CONTROL: (u32, u16) = (0x5f80, 0x0a7f);
/// 1.0 / 3.0 with rounding up; to nearest it ends in 5.
pub const THIRD_ROUNDED_UP: u64 = 0x3fd5_5555_5555_5556;

pub fn set_control((mxcsr, x87): (u32, u16)) -> Result<()> {
    // SAFETY: loads from locals; all exceptions stay masked.
    unsafe {
        asm!("ldmxcsr [{0}]", "fldcw [{1}]", in(reg) &mxcsr, in(reg) &x87);
    }
    Ok(())
}

pub fn control() -> (u32, u16) {
    let (mut mxcsr, mut x87) = (0u32, 0u16);
    // SAFETY: stores to locals.
    unsafe {
        asm!("stmxcsr [{0}]", "fnstcw [{1}]", in(reg) &mut mxcsr, in(reg) &mut x87);
    }
    // The lowest six bits say what has happened, not what was set.
    (mxcsr & !0x3f, x87)
}

/// 1.0 / 3.0 as the processor rounds it now.
pub fn third() -> u64 {
    (black_box(1.0f64) / black_box(3.0f64)).to_bits()
}
