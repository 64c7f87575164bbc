use unbroken_image::{BlockedCall, Registers};
#[derive(Default)]
pub struct BlockedMemory;
pub struct V {
    pub running: Option<Registers>,
    pub replica: Registers,
    pub blocked_call: Option<BlockedCall>,
}
pub fn decide(_m: &mut BlockedMemory, r: &Registers, _h: bool, _n: u64) -> V {
    V {
        running: None,
        replica: *r,
        blocked_call: None,
    }
}
