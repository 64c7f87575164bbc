//! What is read of threads, and that the buffers of a reading can be used again.

mod common;

use common::python;
use unbroken_tracee::{ProcessReading, Tree};

fn numbers(queue: &[unbroken_image::SignalInfo]) -> Vec<i32> {
    queue
        .iter()
        .map(unbroken_image::SignalInfo::signal)
        .collect()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[test]
fn signals_and_masks_are_those_of_each_thread() {
    let guest = python(
        "import os, signal, threading, time\n\
         signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])\n\
         def work():\n\
         \x20   signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])\n\
         \x20   signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)\n\
         \x20   print('ready'); time.sleep(1000)\n\
         os.kill(os.getpid(), signal.SIGTERM)\n\
         signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)\n\
         threading.Thread(target=work, daemon=True).start(); time.sleep(1000)",
    );
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let stopped = tree.stop().unwrap();
    let pid = stopped.processes().next().unwrap().pid;
    let mut reading = ProcessReading::default();
    for _ in 0..2 {
        stopped.read_process(pid, &mut reading).unwrap();
        assert_eq!(numbers(&reading.shared_pending), [libc::SIGTERM]);
        let [leader, worker] = &reading.threads[..] else {
            panic!("{reading:?}");
        };
        assert_eq!(leader.host_tid.0, guest.pid());
        assert_eq!(numbers(&leader.pending), [libc::SIGUSR1]);
        assert_eq!(leader.signal_mask, bit(libc::SIGTERM) | bit(libc::SIGUSR1));
        assert_eq!(numbers(&worker.pending), [libc::SIGUSR2]);
        assert_eq!(worker.signal_mask, leader.signal_mask | bit(libc::SIGUSR2));
    }
}

#[test]
fn a_reading_follows_threads_that_come_and_go() {
    let mut guest = python(
        "import os, sys, threading\n\
         print('ready')\n\
         for line in sys.stdin:\n\
         \x20   gate = threading.Event()\n\
         \x20   threads = [threading.Thread(target=gate.wait, daemon=True) for _ in range(int(line))]\n\
         \x20   [thread.start() for thread in threads]\n\
         \x20   print('done')\n\
         \x20   sys.stdin.readline()\n\
         \x20   gate.set(); [thread.join() for thread in threads]\n\
         \x20   while len(os.listdir('/proc/self/task')) > 1: pass\n\
         \x20   print('done')",
    );
    let mut tree = Tree::seize(&[guest.pid()], true).unwrap();
    let mut reading = ProcessReading::default();
    for count in [7, 2, 20, 0] {
        for expected in [count, 0] {
            guest.tell(&mut tree, &format!("{count}"));
            let stopped = tree.stop().unwrap();
            let process = stopped.processes().next().unwrap();
            stopped.read_process(process.pid, &mut reading).unwrap();
            let read: Vec<_> = reading.threads.iter().map(|thread| thread.tid).collect();
            let there: Vec<_> = process.threads().map(|thread| thread.tid).collect();
            assert_eq!(read, there);
            assert_eq!(read.len(), expected + 1);
            for thread in &reading.threads {
                let (registers, _) = thread.image_registers(false);
                let standing = stopped.registers(thread.host_tid).unwrap();
                assert_eq!(registers.rsp, standing.rsp);
            }
        }
    }
}
