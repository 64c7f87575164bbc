//! Guests that cannot be replicated for a while: protection ends with the reason, and comes back by
//! itself (I6).

use anyhow::{Context, Result};

use super::Guest;

/// What stands in the way, what the status says of it, and what ends it.
const HINDRANCES: [(&str, &str, &str); 3] = [
    ("send a descriptor", "SCM_RIGHTS", "take the descriptor"),
    ("speak unaccepted", "not accepted yet", "accept"),
    ("leave a child", "has not waited", "wait for the child"),
];

#[test]
fn what_hinders_protection_is_said_and_passes() -> Result<()> {
    let mut guest = Guest::start("hindrance", &[])?;
    guest.tell("set up")?;
    for (begins, reason, ends) in HINDRANCES {
        guest.tell(begins)?;
        guest.wait_unprotected(reason).context(begins)?;
        guest.tell(ends)?;
        guest.wait_protected().context(ends)?;
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("after {begins:?}"))?;
    }
    guest.stop()
}

/// An alarm that rings while nobody runs the guest rings in its replica.
#[test]
fn alarms_ring_when_they_should() -> Result<()> {
    let mut guest = Guest::start("alarm", &[])?;
    guest.set_up_and_check()?;
    for _ in 0..2 {
        guest.tell("soon")?;
        guest.move_on()?;
        guest.tell("rang")?;
    }
    guest.stop()
}
