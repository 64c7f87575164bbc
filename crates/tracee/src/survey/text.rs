//! What the text files of `/proc/PID` say, as `proc(5)` describes them.

use unbroken_image::Credentials;

/// What `/proc/PID/status` says about a process.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub credentials: Credentials,
    pub umask: u32,
    /// In the innermost pid namespace; 0 for one that was made outside of it.
    pub session: i32,
    pub process_group: i32,
}

/// The error is the field that is missing or unknown.
pub(super) fn parse_status(text: &str) -> Result<Status, &'static str> {
    let field = |name: &'static str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
            .ok_or(name)
    };
    let four = |name| -> Result<[u32; 4], &'static str> {
        let mut numbers = field(name)?.split_ascii_whitespace();
        let mut values = [0; 4];
        for value in &mut values {
            *value = number(numbers.next(), name)?;
        }
        Ok(values)
    };
    let set = |name| u64::from_str_radix(field(name)?, 16).map_err(|_| name);
    let innermost = |name| number(field(name)?.split_ascii_whitespace().last(), name);
    let groups = field("Groups")?
        .split_ascii_whitespace()
        .map(|group| number(Some(group), "Groups"))
        .collect::<Result<_, _>>()?;
    Ok(Status {
        credentials: Credentials {
            uids: four("Uid")?,
            gids: four("Gid")?,
            groups,
            inheritable: set("CapInh")?,
            permitted: set("CapPrm")?,
            effective: set("CapEff")?,
            bounding: set("CapBnd")?,
            ambient: set("CapAmb")?,
        },
        umask: u32::from_str_radix(field("Umask")?, 8).map_err(|_| "Umask")?,
        session: innermost("NSsid")?,
        process_group: innermost("NSpgid")?,
    })
}

/// The bounds of an address space that `/proc/PID/stat` has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

pub(super) fn parse_stat(text: &str) -> Option<Bounds> {
    // The name, field 2, may contain anything; what follows it does not contain a parenthesis.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| -> Option<u64> { fields.get(number - 3)?.parse().ok() };
    Some(Bounds {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
    })
}

/// One entry of `/proc/PID/timers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TimerLine {
    pub id: i32,
    pub signal: i32,
    pub value: u64,
    /// `SIGEV_*`.
    pub notify: i32,
    /// Process or thread to be notified, as a number of the reader's pid namespace.
    pub target: i32,
    pub clock: i32,
}

pub(super) fn parse_timers(text: &str) -> Option<Vec<TimerLine>> {
    let mut timers = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let (signal, value) = lines.next()?.strip_prefix("signal: ")?.split_once('/')?;
        let notify = lines.next()?.strip_prefix("notify: ")?;
        let (how, target) = notify.split_once('/')?;
        let (kind, target) = target.split_once('.')?;
        // fs/proc/base.c, show_timer
        let how = match how {
            "signal" => libc::SIGEV_SIGNAL,
            "none" => libc::SIGEV_NONE,
            "thread" => libc::SIGEV_THREAD,
            _ => return None,
        };
        let notify = match kind {
            "pid" => how,
            "tid" => how | libc::SIGEV_THREAD_ID,
            _ => return None,
        };
        timers.push(TimerLine {
            id: line.strip_prefix("ID: ")?.trim().parse().ok()?,
            signal: signal.parse().ok()?,
            value: u64::from_str_radix(value.trim(), 16).ok()?,
            notify,
            target: target.trim().parse().ok()?,
            clock: lines
                .next()?
                .strip_prefix("ClockID: ")?
                .trim()
                .parse()
                .ok()?,
        });
    }
    Some(timers)
}

fn number<T: std::str::FromStr>(text: Option<&str>, name: &'static str) -> Result<T, &'static str> {
    text.and_then(|text| text.parse().ok()).ok_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tserver\nUmask:\t0027\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n\
        Groups:\t9 10 \nNSpgid:\t900\t1\nNSsid:\t800\t0\nCapInh:\t0000000000000001\n\
        CapPrm:\t0000000000000002\nCapEff:\t000001ffffffffff\nCapBnd:\t0000000000000004\n\
        CapAmb:\t0000000000000005\n";

    #[test]
    fn status_of_a_process_that_dropped_its_rights() {
        let status = parse_status(STATUS).unwrap();
        assert_eq!(status.credentials.uids, [1, 2, 3, 4]);
        assert_eq!(status.credentials.gids, [5, 6, 7, 8]);
        assert_eq!(status.credentials.groups, [9, 10]);
        assert_eq!(status.credentials.effective, 0x1ff_ffff_ffff);
        assert_eq!(status.credentials.ambient, 5);
        assert_eq!(status.umask, 0o27);
        assert_eq!((status.session, status.process_group), (0, 1));
        assert_eq!(parse_status("Umask:\t0022\n"), Err("Groups"));
        assert_eq!(
            parse_status(&STATUS.replace("CapEff:\t0", "CapEff:\tx")),
            Err("CapEff")
        );
    }

    #[test]
    fn stat_of_a_process_with_an_awkward_name() {
        let numbers: Vec<String> = (4..=52).map(|number: u32| number.to_string()).collect();
        let text = format!("7 (a) b (c)) S {}\n", numbers.join(" "));
        let bounds = parse_stat(&text).unwrap();
        assert_eq!(bounds.start_code, 26);
        assert_eq!(bounds.start_stack, 28);
        assert_eq!(bounds.start_data, 45);
        assert_eq!(bounds.env_end, 51);
        assert_eq!(parse_stat("7 (x) S 1 2 3"), None);
    }

    #[test]
    fn timers_of_every_kind() {
        let text = "ID: 0\nsignal: 14/00007ffd00000010\nnotify: signal/pid.77\nClockID: 1\n\
                    ID: 3\nsignal: 34/0000000000000000\nnotify: signal/tid.78\nClockID: -6\n\
                    ID: 4\nsignal: 0/0000000000000000\nnotify: none/pid.77\nClockID: 0\n";
        let timers = parse_timers(text).unwrap();
        assert_eq!(timers.len(), 3);
        let first = TimerLine {
            id: 0,
            signal: 14,
            value: 0x7ffd_0000_0010,
            notify: 0,
            target: 77,
            clock: 1,
        };
        assert_eq!(timers[0], first);
        assert_eq!((timers[1].notify, timers[1].target), (4, 78));
        assert_eq!((timers[1].id, timers[1].clock), (3, -6));
        assert_eq!(timers[2].notify, libc::SIGEV_NONE);
        assert_eq!(parse_timers(""), Some(Vec::new()));
        assert_eq!(parse_timers("ID: 0\n"), None);
    }

    #[test]
    fn fuzz_status_stat_and_timers() {
        let stat = "7 (a) b (c)) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 \
                    27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52\n";
        let timers = "ID: 0\nsignal: 14/00007ffd00000010\nnotify: signal/pid.77\nClockID: 1\n\
                      ID: 3\nsignal: 34/0\nnotify: none/tid.78\nClockID: -6\n";
        unbroken_fuzz::text("proc-status", &[STATUS], |text| {
            let _ = parse_status(text);
        });
        unbroken_fuzz::text("proc-stat", &[stat], |text| {
            let _ = parse_stat(text);
        });
        unbroken_fuzz::text("proc-timers", &[timers], |text| {
            let _ = parse_timers(text);
        });
    }
}
