//! Where this kernel keeps things: a reader of its type information (BTF,
//! Documentation/bpf/btf.rst in the kernel's sources).
//!
//! The kernel's own blob is well formed, but it is some megabytes that come from outside: every
//! access is checked, references are followed a bounded number of times, and what does not add up
//! is an error.

use std::io;

/// The kernel's own types.
pub(super) const KERNEL_TYPES: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const HEADER_BYTES: usize = 24;
const TYPE_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;

/// Real chains are shorter; a damaged blob may have circles.
const DEPTH_MAX: usize = 16;
/// Members looked at for one name. Structures have hundreds at most.
const MEMBERS_MAX: usize = 10_000;

/// What a type is (include/uapi/linux/btf.h), as far as it is asked here.
mod kind {
    pub const INT: u32 = 1;
    pub const POINTER: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNCTION: u32 = 12;
    pub const FUNCTION_PROTOTYPE: u32 = 13;
    pub const VARIABLE: u32 = 14;
    pub const DATA_SECTION: u32 = 15;
    pub const DECLARATION_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
    pub const LAST: u32 = ENUM64;
}

/// Where a member lies in the outermost structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub offset_bytes: u32,
    pub size_bytes: u32,
}

/// A parsed blob. Types are numbered from 1.
pub(super) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Where type `index + 1` begins in `types`.
    starts: Vec<u32>,
}

/// The fixed part of a type.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    info: u32,
    /// Its size, or the type that it refers to.
    size_or_type: u32,
    /// Where what follows the fixed part begins in `types`.
    rest: usize,
}

impl Type {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Bit fields among the members.
    fn packs_bits(self) -> bool {
        self.info >> 31 == 1
    }

    /// How long what follows the fixed part is.
    fn rest_bytes(self) -> usize {
        match self.kind() {
            kind::INT | kind::VARIABLE | kind::DECLARATION_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION => self.count() * MEMBER_BYTES,
            kind::DATA_SECTION | kind::ENUM64 => self.count() * 12,
            kind::ENUM | kind::FUNCTION_PROTOTYPE => self.count() * 8,
            _ => 0,
        }
    }
}

fn damaged(what: &str) -> io::Error {
    let text = format!("the kernel's type information is damaged: {what}");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

fn section(blob: &[u8], base: usize, offset: u32, length: u32) -> Option<&[u8]> {
    let start = base.checked_add(offset as usize)?;
    blob.get(start..start.checked_add(length as usize)?)
}

impl<'a> Btf<'a> {
    /// Finds the beginning of every type.
    ///
    /// # Errors
    /// `InvalidData` for anything but a whole blob of this machine's byte order.
    pub fn parse(blob: &'a [u8]) -> io::Result<Btf<'a>> {
        let header = |at| word(blob, at).ok_or_else(|| damaged("it is cut off in its header"));
        if header(0)? & 0xffff != u32::from(MAGIC) {
            return Err(damaged("it does not begin as such"));
        }
        let base = header(4)? as usize;
        if base < HEADER_BYTES {
            return Err(damaged("its header is too short"));
        }
        let part = |offset, length| {
            section(blob, base, offset, length).ok_or_else(|| damaged("it is cut off"))
        };
        let mut btf = Btf {
            types: part(header(8)?, header(12)?)?,
            strings: part(header(16)?, header(20)?)?,
            starts: Vec::with_capacity(blob.len() / 32),
        };
        let mut at = 0;
        while at < btf.types.len() {
            let found = btf
                .type_at(at)
                .ok_or_else(|| damaged("a type is cut off"))?;
            if found.kind() > kind::LAST {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("kind {} of types is unknown here", found.kind()),
                ));
            }
            btf.starts.push(at as u32);
            at = found.rest + found.rest_bytes();
        }
        if at != btf.types.len() {
            return Err(damaged("its last type is cut off"));
        }
        Ok(btf)
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        Some(Type {
            name: word(self.types, at)?,
            info: word(self.types, at + 4)?,
            size_or_type: word(self.types, at + 8)?,
            rest: at + TYPE_BYTES,
        })
    }

    fn type_of(&self, number: u32) -> Option<Type> {
        let index = (number as usize).checked_sub(1)?;
        self.type_at(*self.starts.get(index)? as usize)
    }

    fn is_named(&self, name: u32, expected: &str) -> bool {
        let bytes = self.strings.get(name as usize..);
        let rest = bytes.and_then(|bytes| bytes.strip_prefix(expected.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }

    fn find(&self, kind: u32, name: &str) -> io::Result<u32> {
        let is_it = |at: &u32| {
            self.type_at(*at as usize)
                .is_some_and(|found| found.kind() == kind && self.is_named(found.name, name))
        };
        match self.starts.iter().position(is_it) {
            Some(index) => Ok(index as u32 + 1),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("this kernel has no {name}"),
            )),
        }
    }

    /// The number of a function of the kernel.
    pub fn function(&self, name: &str) -> io::Result<u32> {
        self.find(kind::FUNCTION, name)
    }

    /// The number of a structure of the kernel.
    pub fn structure(&self, name: &str) -> io::Result<u32> {
        self.find(kind::STRUCT, name)
    }

    /// The place of a number in structure `number`: `path` names the members on the way, with dots
    /// between them. Members of structures and unions without a name are found like others.
    pub fn place(&self, number: u32, path: &str) -> io::Result<Place> {
        let lacks = || {
            let text = format!("this kernel has no number {path} there");
            io::Error::new(io::ErrorKind::Unsupported, text)
        };
        let mut number = number;
        let mut offset_bytes = 0u32;
        for name in path.split('.') {
            let mut patience = MEMBERS_MAX;
            let found = self.member(number, name, DEPTH_MAX, &mut patience);
            let (member, offset) = found.ok_or_else(lacks)?;
            offset_bytes = offset_bytes.checked_add(offset).ok_or_else(lacks)?;
            number = member;
        }
        let found = self.resolve(number).ok_or_else(lacks)?;
        let size_bytes = match found.kind() {
            kind::INT | kind::ENUM | kind::ENUM64 => found.size_or_type,
            kind::POINTER => 8,
            _ => return Err(lacks()),
        };
        Ok(Place {
            offset_bytes,
            size_bytes,
        })
    }

    /// The type behind names and qualifiers.
    fn resolve(&self, number: u32) -> Option<Type> {
        let mut found = self.type_of(number)?;
        for _ in 0..DEPTH_MAX {
            match found.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    found = self.type_of(found.size_or_type)?;
                }
                _ => return Some(found),
            }
        }
        None
    }

    /// The type and offset in bytes of a member; none for a bit field.
    fn member(
        &self,
        number: u32,
        name: &str,
        depth: usize,
        patience: &mut usize,
    ) -> Option<(u32, u32)> {
        let outer = self.resolve(number)?;
        if !matches!(outer.kind(), kind::STRUCT | kind::UNION) {
            return None;
        }
        let deeper = depth.checked_sub(1)?;
        for index in 0..outer.count() {
            *patience = patience.checked_sub(1)?;
            let at = outer.rest + index * MEMBER_BYTES;
            let member_name = word(self.types, at)?;
            let member = word(self.types, at + 4)?;
            let position = word(self.types, at + 8)?;
            let (width_bits, offset_bits) = match outer.packs_bits() {
                true => (position >> 24, position & 0xff_ffff),
                false => (0, position),
            };
            if self.is_named(member_name, name) {
                let is_whole = width_bits == 0 && offset_bits % 8 == 0;
                return is_whole.then_some((member, offset_bits / 8));
            }
            if self.is_named(member_name, "")
                && let Some((found, inner)) = self.member(member, name, deeper, patience)
            {
                return Some((found, inner.checked_add(offset_bits / 8)?));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
