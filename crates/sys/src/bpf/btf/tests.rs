use super::*;

fn kernel() -> Vec<u8> {
    std::fs::read(KERNEL_TYPES).expect("this kernel's types")
}

/// A blob with these types and strings.
fn blob(types: &[u32], strings: &[u8]) -> Vec<u8> {
    let types_bytes = 4 * types.len() as u32;
    let header = [
        u32::from(MAGIC) | 1 << 16,
        HEADER_BYTES as u32,
        0,
        types_bytes,
        types_bytes,
        strings.len() as u32,
    ];
    let words = header.iter().chain(types);
    let mut blob: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    blob.extend_from_slice(strings);
    blob
}

const STRUCT: u32 = kind::STRUCT << 24;
const UNION: u32 = kind::UNION << 24;
const BITS: u32 = 1 << 31;

/// `int` (1); a union without a name of an `int b` (2); a structure `s` (3) of an `int a`, that
/// union, and two bits `c` and `d`; another one `t` (4) of an `s in`.
fn sample() -> Vec<u8> {
    let int = [1, kind::INT << 24, 4, 32];
    let union = [0, UNION | 1, 4, 7, 1, 0];
    let inner = [
        5,
        BITS | STRUCT | 3,
        12,
        9,
        1,
        0,
        0,
        2,
        32,
        11,
        1,
        1 << 24 | 64,
    ];
    let outer = [13, STRUCT | 1, 20, 15, 3, 64];
    let types = [&int[..], &union, &inner, &outer].concat();
    blob(&types, b"\0int\0s\0b\0a\0c\0t\0in\0")
}

#[test]
fn members_are_found_through_structures_and_what_has_no_name() {
    let blob = sample();
    let btf = Btf::parse(&blob).expect("whole");
    let outer = btf.structure("t").expect("there");
    let place = |path| btf.place(outer, path).ok();
    let at = |offset_bytes| {
        Some(Place {
            offset_bytes,
            size_bytes: 4,
        })
    };
    assert_eq!(place("in.a"), at(8));
    assert_eq!(place("in.b"), at(12));
    for path in ["in.c", "in.x", "in", "", ".", "in.a.a", "in."] {
        assert_eq!(place(path), None, "{path}");
    }
    assert!(btf.function("s").is_err());
    assert!(btf.place(0, "a").is_err());
    assert!(btf.place(99, "a").is_err());
}

#[test]
fn circles_end() {
    // A structure whose members without names are itself, many times; a name for itself.
    let mut circle = vec![1, STRUCT | 40, 4];
    circle.extend([0, 1, 0].repeat(40));
    circle.extend([3, kind::TYPEDEF << 24, 2]);
    let blob = blob(&circle, b"\0s\0t\0");
    let btf = Btf::parse(&blob).expect("whole");
    assert!(btf.place(1, "t").is_err());
    assert!(btf.place(2, "t").is_err());
}

#[test]
fn a_blob_that_is_cut_off_anywhere_is_an_error() {
    let blob = sample();
    for length in 0..blob.len() {
        assert!(Btf::parse(&blob[..length]).is_err(), "{length}");
    }
    let blob = kernel();
    for length in (0..blob.len()).step_by(99_991) {
        assert!(Btf::parse(&blob[..length]).is_err(), "{length}");
    }
}

fn ask(blob: &[u8]) {
    let Ok(btf) = Btf::parse(blob) else { return };
    for name in ["s", "t", "int"] {
        let _ = btf.function(name);
        let _ = btf.structure(name);
    }
    for number in 0..8 {
        for path in ["in.a", "in.b", "a", "b"] {
            let _ = btf.place(number, path);
        }
    }
}

#[test]
fn fuzz_btf() {
    unbroken_fuzz::bytes("btf", &[sample()], ask);
}

/// Every word of a small blob takes odd values, one after the other: the answers may be anything.
#[test]
fn a_damaged_blob_panics_nothing() {
    let whole = sample();
    for at in 0..whole.len() - 3 {
        for value in [
            0,
            1,
            3,
            4,
            12,
            24,
            0xffff,
            1 << 24,
            STRUCT | 9,
            1 << 31,
            u32::MAX,
        ] {
            let mut blob = whole.clone();
            blob[at..at + 4].copy_from_slice(&value.to_le_bytes());
            ask(&blob);
        }
    }
}

#[test]
fn this_kernels_sockets_are_found_fast() {
    let started = std::time::Instant::now();
    let blob = kernel();
    let btf = Btf::parse(&blob).expect("whole");
    let sock = btf.structure("tcp_sock").expect("there");
    let state = btf.place(sock, "inet_conn.icsk_inet.sk.__sk_common.skc_state");
    assert_eq!(state.expect("a byte").size_bytes, 1);
    assert!(btf.function("bpf_iter_task_file").expect("there") > 0);
    println!("{:?}", started.elapsed());
}
