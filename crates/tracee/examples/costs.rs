//! What stopping, calling and scanning cost on this machine: medians in nanoseconds, on stdout.
//!
//! `cargo run --release --example costs -p unbroken-tracee [same|other [MB]]` traces itself run again
//! as a process of five threads with so much memory (20 MB), from the same core (the default) or from
//! another.

use std::time::Instant;
use unbroken_image::{Mapping, PageRun};
use unbroken_sys::affinity;
use unbroken_tracee::memory_map::MapReader;
use unbroken_tracee::{DirtyTracker, HostTid, ProcessReading, Tree, WriteFaults};

const ROUNDS: usize = 2000;
const SERVICE_CORE: usize = 1;

fn guest(megabytes: usize) -> ! {
    for _ in 0..4 {
        std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
    }
    let mut memory = vec![1_u8; megabytes << 20];
    println!("ready");
    let mut position = 0;
    loop {
        for _ in 0..20 {
            position = (position + 7 * 4096) % memory.len();
            memory[position] = memory[position].wrapping_add(1);
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
}

fn median(name: &str, mut times: Vec<u64>) {
    times.sort_unstable();
    println!(
        "{name}: p50 {} p99 {}",
        times[times.len() / 2],
        times[times.len() * 99 / 100]
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let argument = std::env::args().nth(1);
    let megabytes = std::env::args()
        .nth(2)
        .map_or(Ok(20), |text| text.parse())?;
    if argument.as_deref() == Some("guest") {
        guest(megabytes);
    }
    affinity::bind(0, &[SERVICE_CORE])?;
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(["guest", &megabytes.to_string()])
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    affinity::bind(
        0,
        if argument.as_deref() == Some("other") {
            &[0]
        } else {
            &[SERVICE_CORE]
        },
    )?;
    let mut line = String::new();
    let output = child.stdout.take().ok_or("no output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
    affinity::set_urgent(true)?;
    measure(child.id() as i32)?;
    child.kill()?;
    Ok(())
}

fn measure(pid: i32) -> Result<(), Box<dyn std::error::Error>> {
    let tid = HostTid(pid);
    let mut tree = Tree::seize(&[pid], true)?;
    let mut map: Vec<Mapping> = Vec::new();
    let (mut tracker, mut faults) = {
        let mut stopped = tree.stop()?;
        stopped.install_blob(tid)?;
        let tracker = DirtyTracker::install(&mut stopped, tid)?;
        let process = stopped.processes().next().ok_or("no process")?;
        MapReader::default().survey(process, &mut map)?;
        for mapping in &map {
            tracker.register(mapping, mapping.range)?;
        }
        let faults = WriteFaults::follow(process, WriteFaults::prepare(SERVICE_CORE)?)?;
        (tracker, faults)
    };
    let mut names = [
        "stop",
        "read threads",
        "batch of 1",
        "batch of 10",
        "hear of writes",
        "scan what was heard",
        "scan",
        "empty scan",
        "copy",
        "resume",
    ]
    .map(|name| (name, Vec::new()));
    let mut pages: Vec<PageRun> = Vec::new();
    let mut bytes = vec![0; 64 << 20];
    let mut reading = ProcessReading::default();
    for _ in 0..ROUNDS {
        let mut last = Instant::now();
        let mut lap = 0;
        let mut note = || {
            names[lap].1.push(last.elapsed().as_nanos() as u64);
            lap += 1;
            last = Instant::now();
        };
        let mut stopped = tree.stop()?;
        note();
        let process = stopped.processes().next().ok_or("no process")?;
        stopped.read_process(process.pid, &mut reading)?;
        note();
        for calls in [1, 10] {
            let mut batch = stopped.remote(tid);
            for _ in 0..calls {
                batch.call(libc::SYS_gettid, &[])?;
            }
            batch.run()?;
            note();
        }
        pages.clear();
        let process = stopped.processes().next().ok_or("no process")?;
        let heard = faults.take(process)?.unwrap_or_default();
        note();
        tracker.scan_ranges(&map, heard, &mut pages)?;
        note();
        tracker.scan(&map, &mut pages)?;
        note();
        tracker.scan(&map, &mut Vec::new())?;
        note();
        let length = pages.iter().map(|run| run.count as usize * 4096).sum();
        // Everything counts as written at first.
        bytes.resize(bytes.len().max(length), 0);
        let process = stopped.processes().next().ok_or("no process")?;
        tracker.read_pages(process.memory(), &pages, &mut bytes[..length])?;
        note();
        stopped.resume()?;
        note();
        std::thread::sleep(std::time::Duration::from_micros(300));
    }
    println!(
        "pages in the last round: {}",
        pages.iter().map(|run| run.count).sum::<u64>()
    );
    for (name, times) in names {
        median(name, times);
    }
    Ok(())
}
