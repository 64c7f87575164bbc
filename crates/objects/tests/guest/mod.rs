//! A process that makes the system calls a test tells it to, and is otherwise still.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use unbroken_image::Pid;
use unbroken_objects::table::Source;

const PROGRAM: &str = include_str!("guest.py");

pub struct Guest {
    input: File,
    output: BufReader<File>,
    pub pid: i32,
    /// Only the first of a tree is a child of the test; killed and waited for at the end.
    child: Option<Child>,
}

impl Guest {
    pub fn start() -> Guest {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start python3");
        let input = child.stdin.take().expect("stdin is piped");
        let output = child.stdout.take().expect("stdout is piped");
        let input = File::from(std::os::fd::OwnedFd::from(input));
        let output = BufReader::new(File::from(std::os::fd::OwnedFd::from(output)));
        let pid = child.id() as i32;
        let mut guest = Guest {
            input,
            output,
            pid,
            child: Some(child),
        };
        // Once it answers it has opened whatever Python opens.
        assert_eq!(
            guest.say(&format!("{}", libc::SYS_getpid)),
            i64::from(guest.pid)
        );
        guest
    }

    /// Makes one call; the result, or the negative errno.
    pub fn say(&mut self, line: &str) -> i64 {
        writeln!(self.input, "{line}").expect("write to the guest");
        let mut answer = String::new();
        self.output
            .read_line(&mut answer)
            .expect("read from the guest");
        answer
            .trim()
            .parse()
            .unwrap_or_else(|_| panic!("the guest answered {answer:?} to {line}"))
    }

    pub fn call(&mut self, number: i64, arguments: &[&dyn std::fmt::Display]) -> i64 {
        let words: Vec<String> = arguments.iter().map(|word| word.to_string()).collect();
        self.say(&format!("{number} {}", words.join(" ")))
    }

    /// As [`Guest::call`], for a call that must work.
    pub fn must(&mut self, number: i64, arguments: &[&dyn std::fmt::Display]) -> i64 {
        let result = self.call(number, arguments);
        assert!(result >= 0, "call {number} failed: {result}");
        result
    }

    #[allow(dead_code)]
    pub fn fork(&mut self) -> Guest {
        let base =
            std::env::temp_dir().join(format!("unbroken-fork-{}-{}", std::process::id(), self.pid));
        let paths = ["in", "out"].map(|end| format!("{}-{end}", base.display()));
        let made = Command::new("mkfifo")
            .args(&paths)
            .status()
            .expect("run mkfifo");
        assert!(made.success());
        let pid = self.say(&format!("fork {} {}", paths[0], paths[1])) as i32;
        let input = File::options()
            .write(true)
            .open(&paths[0])
            .expect("open the FIFO");
        let output = BufReader::new(File::open(&paths[1]).expect("open the FIFO"));
        for path in paths {
            std::fs::remove_file(path).expect("remove the FIFO");
        }
        let mut guest = Guest {
            input,
            output,
            pid,
            child: None,
        };
        assert_eq!(guest.say(&format!("{}", libc::SYS_getpid)), i64::from(pid));
        guest
    }

    pub fn source(&self) -> Source {
        Source::open(Pid(self.pid), self.pid).expect("open the guest")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
