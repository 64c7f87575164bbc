//! Names of things inside a service. None of them means anything outside its namespaces.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A process, by its number in the service's own pid namespace.
    Pid(i32)
}
id! {
    /// A thread, by its number in the service's own pid namespace.
    Tid(i32)
}
id! {
    /// A descriptor number of a process of the service.
    Fd(i32)
}
id! {
    /// One open file description (what `dup` shares), numbered by the primary; never used twice
    /// in one term.
    ObjectId(u64)
}

/// A slot of a descriptor table: which description it names, and the one flag that belongs to the
/// slot and not to the description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub object: ObjectId,
    pub close_on_exec: bool,
}
