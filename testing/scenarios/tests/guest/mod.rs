//! A guest under protection, and the conversation with it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use unbroken_harness::{KillPlan, Launch, PATIENCE, Random, Scratch, Service, Target};
use unbroken_scenarios::{PORT, host};

/// Moves of one guest: to a replica, and to a replica of a replica.
const MOVES: usize = 2;

/// A protected guest, and the one connection over which everything is said to it.
pub struct Guest {
    service: Service,
    address: SocketAddr,
    conversation: BufReader<TcpStream>,
    random: Random,
    _directory: Scratch,
}

impl Guest {
    /// Starts it in a host of its own, with more options of `unbroken run`.
    pub fn start(program: &str, options: &[&str]) -> Result<Self> {
        let random = host()?;
        let directory = Scratch::new(&format!("guest-{program}"))?;
        open_to_all(directory.path())?;
        let command = [
            unbroken_clients::config::find_own_program(program)?,
            PORT.to_string().into(),
            directory.path().into(),
        ];
        let command = command.map(|word| word.to_string_lossy().into_owned());
        let launch = Launch::new(program, command.to_vec()).option(options);
        let service = Service::start(&launch)?;
        let address = service.listening(PORT)?;
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            service,
            address,
            conversation: BufReader::new(stream),
            random,
            _directory: directory,
        })
    }

    /// Where the guest can be reached.
    #[allow(dead_code)]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Says a line and hears `ok`.
    pub fn tell(&mut self, words: &str) -> Result<()> {
        let answer = self.ask(words);
        let answer = answer.with_context(|| {
            let (out, err) = self.service.printed();
            format!("after {words:?}; stdout: {out}; stderr: {err}")
        })?;
        ensure!(answer == "ok", "after {words:?}: {answer}");
        Ok(())
    }

    fn ask(&mut self, words: &str) -> Result<String> {
        self.conversation
            .get_ref()
            .write_all(format!("{words}\n").as_bytes())?;
        let mut answer = String::new();
        self.conversation.read_line(&mut answer)?;
        ensure!(answer.ends_with('\n'), "the connection ended");
        Ok(answer.trim_end().to_string())
    }

    /// Kills the service at a random moment; the guest goes on in its replica.
    pub fn move_on(&mut self) -> Result<()> {
        let plan = KillPlan::new(Target::Service, 1);
        self.service
            .kill_repeatedly(&plan, &mut self.random, |_| {})?;
        Ok(())
    }

    /// Ends the guest; nothing of it may be left.
    pub fn stop(self) -> Result<()> {
        self.service.stop()?;
        Ok(())
    }
}

/// A guest may run as another user.
fn open_to_all(directory: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777))?;
    Ok(())
}

/// What every guest that needs nothing of the host goes through. The first check, before any kill,
/// shows that a failure after one is not the guest's own.
pub fn moved_twice(program: &str) -> Result<()> {
    moved_twice_with(program, &[])
}

pub fn moved_twice_with(program: &str, options: &[&str]) -> Result<()> {
    let mut guest = Guest::start(program, options)?;
    guest.tell("set up")?;
    guest.tell("check").context("before any kill")?;
    for number in 1..=MOVES {
        guest.move_on()?;
        guest
            .tell("check")
            .with_context(|| format!("after kill {number}"))?;
    }
    guest.stop()
}
