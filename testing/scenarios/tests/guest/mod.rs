//! A guest under protection, and the conversation with it.

mod announced;
mod background;
mod bounds;
mod network;
mod passing;
mod text;

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use unbroken_harness::{
    Ended, KillPlan, Launch, PATIENCE, Random, Scratch, Service, Signal, Target, send, wait_until,
};
use unbroken_scenarios::{PORT, host};

/// How often a moment that only chance can give is waited for.
const TRIES: usize = 20;

/// A protected guest, and the one connection over which everything is said to it.
pub struct Guest {
    service: Service,
    address: SocketAddr,
    conversation: BufReader<TcpStream>,
    random: Random,
    directory: Scratch,
}

impl Guest {
    /// Starts it in a host of its own, with more options of `unbroken run`.
    pub fn start(program: &str, options: &[&str]) -> Result<Self> {
        Self::start_as(program, &[], options)
    }

    /// As [`Guest::start`], with more words for the guest itself.
    pub fn start_as(program: &str, words: &[&str], options: &[&str]) -> Result<Self> {
        Self::start_with(program, |mut launch| {
            launch.command.extend(words.iter().map(ToString::to_string));
            launch.option(options)
        })
    }

    /// As [`Guest::start`], launched in some other way.
    pub fn start_with(program: &str, how: impl FnOnce(Launch) -> Launch) -> Result<Self> {
        let random = host()?;
        let directory = Scratch::new(&format!("guest-{program}"))?;
        open_to_all(directory.path())?;
        let command = [
            unbroken_clients::config::find_own_program(program)?,
            PORT.to_string().into(),
            directory.path().into(),
        ];
        let command = command.map(|word| word.to_string_lossy().into_owned());
        let launch = how(Launch::new(program, command.to_vec()));
        let service = Service::start(&launch)?;
        let address = service.listening(PORT)?;
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            service,
            address,
            conversation: BufReader::new(stream),
            random,
            directory,
        })
    }

    /// Where the guest can be reached.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address of version 6, as `unbroken run` says it.
    pub fn address_v6(&self) -> Result<IpAddr> {
        let (_, printed) = self.service.printed();
        let (_, addresses) = printed
            .split_once(" is protected at ")
            .context("no address was printed")?;
        let mut words = addresses.split(|c: char| c == ',' || c.is_whitespace());
        words
            .find_map(|word| word.parse().ok().filter(IpAddr::is_ipv6))
            .context("no address of version 6: is IPv6 switched off here?")
    }

    /// A directory that the guest can write to.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Says a line and hears `ok`.
    pub fn tell(&mut self, words: &str) -> Result<()> {
        let answer = self.ask(words);
        let answer =
            answer.with_context(|| format!("after {words:?}\n{}", self.service.story()))?;
        ensure!(answer == "ok", "after {words:?}: {answer}");
        Ok(())
    }

    fn ask(&mut self, words: &str) -> Result<String> {
        ask(&mut self.conversation, words)
    }

    /// Kills the service at a random moment; the guest goes on in its replica.
    pub fn move_on(&mut self) -> Result<()> {
        let plan = KillPlan::new(Target::Service, 1);
        self.service
            .kill_repeatedly(&plan, &mut self.random, |_| {})?;
        Ok(())
    }

    /// Kills the primary: first while it is protected, so that the replica goes on, then beside a
    /// standby that is not ready, which takes hold of the service as it runs.
    pub fn outlive_primaries(&mut self) -> Result<()> {
        let plan = KillPlan::new(Target::Primary, 1);
        self.service
            .kill_repeatedly(&plan, &mut self.random, |_| {})?;
        let before = self.service.kill(Target::Standby, Signal::SIGKILL)?;
        let status = self.service.wait_for("another standby", |status| {
            status.standby_pid.is_some() && status.standby_pid != before.standby_pid
        })?;
        let standby = status.standby_pid.unwrap_or_default();
        send(standby, Signal::SIGSTOP)?;
        self.service.kill(Target::Primary, Signal::SIGKILL)?;
        send(standby, Signal::SIGCONT)?;
        self.service.wait_for("protection by others", |status| {
            status.is_protected() && status.primary_pid == Some(standby)
        })?;
        Ok(())
    }

    /// Says `words`, kills the service again and again before it has answered, if it takes so long,
    /// and hears `ok`.
    pub fn tell_through_kills(&mut self, words: &str, kills: usize) -> Result<()> {
        writeln!(self.conversation.get_ref(), "{words}")?;
        let plan = KillPlan::new(Target::Service, kills);
        self.service
            .kill_repeatedly(&plan, &mut self.random, |_| {})?;
        let mut answer = String::new();
        self.conversation.read_line(&mut answer)?;
        ensure!(answer == "ok\n", "after {words:?}: {answer}");
        Ok(())
    }

    /// Waits until the status says that it is not protected, and why.
    pub fn wait_unprotected(&self, why: &str) -> Result<()> {
        self.service
            .wait_for(&format!("the reason {why:?}"), |status| {
                let reason = status.whole["reason"].as_str();
                status.state == "unprotected" && reason.is_some_and(|text| text.contains(why))
            })?;
        Ok(())
    }

    /// Waits until it is protected.
    pub fn wait_protected(&self) -> Result<()> {
        self.service.wait_protected()?;
        Ok(())
    }

    /// Sets it up and checks it: before any kill, which shows that a failure after one is not the
    /// guest's own; in its replica; in a replica of that, which it has used; and in a replica of a
    /// replica that never ran much. Returns how many checks that was.
    pub fn set_up_and_check(&mut self) -> Result<usize> {
        self.tell("set up")?;
        let rows = [0, 1, 1, 2];
        for (number, kills) in rows.into_iter().enumerate() {
            for _ in 0..kills {
                self.move_on()?;
            }
            self.tell("check")
                .with_context(|| format!("check {number}, after {kills} kills more"))?;
        }
        Ok(rows.len())
    }

    /// Says `words`, of which the answer needs an epoch that does not get through to a stopped
    /// standby; kills the primary meanwhile, and hears `ok` from the replica.
    pub fn tell_while_the_primary_dies(&mut self, words: &str) -> Result<()> {
        /// Time enough to send what there is room for, too short for the standby to be given up.
        const STUCK: Duration = Duration::from_secs(2);
        let before = self.service.kill(Target::Standby, Signal::SIGSTOP)?;
        let stream = self.conversation.get_ref();
        writeln!(&*stream, "{words}")?;
        stream.set_read_timeout(Some(STUCK))?;
        let early = stream.peek(&mut [0]);
        stream.set_read_timeout(Some(PATIENCE))?;
        ensure!(early.is_err(), "an answer came past a stopped standby");
        self.service.kill(Target::Primary, Signal::SIGKILL)?;
        if let Some(standby) = before.standby_pid {
            send(standby, Signal::SIGCONT)?;
        }
        let mut answer = String::new();
        self.conversation.read_line(&mut answer)?;
        ensure!(answer == "ok\n", "after {words:?}: {answer}");
        self.service.wait_for("the takeover", |status| {
            status.is_protected() && status.takeovers > before.takeovers
        })?;
        Ok(())
    }

    /// Stops a new standby in the middle of its fill, sends the service a signal that means nothing
    /// to it, says `words`, and hears `ok` while the fill still waits.
    pub fn tell_while_a_fill_waits(&mut self, words: &str) -> Result<()> {
        /// Before the standby is given up, which would end the wait.
        const SOON: Duration = Duration::from_secs(8);
        let standby = self.stop_a_standby_in_its_fill()?;
        let status = self.service.status()?;
        let service = status.service_pids.first().copied().unwrap_or_default();
        send(service, Signal::SIGWINCH)?;
        let stream = self.conversation.get_ref();
        stream.set_read_timeout(Some(SOON))?;
        self.tell(words)?;
        let stream = self.conversation.get_ref();
        stream.set_read_timeout(Some(PATIENCE))?;
        send(standby, Signal::SIGCONT)?;
        self.service.wait_protected()?;
        Ok(())
    }

    /// A standby that is stopped somewhere in its fill, with whatever there is room for on its way:
    /// its pid. Where a fill is at a given moment nobody can say, so one that was complete by then
    /// is followed by another.
    fn stop_a_standby_in_its_fill(&self) -> Result<i32> {
        /// Time enough for what there is room for to be sent.
        const SENT: Duration = Duration::from_secs(1);
        for _ in 0..TRIES {
            let marks = self.marked_fills();
            let standby = self.replace_standby()?;
            send(standby, Signal::SIGSTOP)?;
            std::thread::sleep(SENT);
            if self.marked_fills() == marks {
                return Ok(standby);
            }
            send(standby, Signal::SIGCONT)?;
            self.service.wait_protected()?;
        }
        bail!("{TRIES} fills were marked complete, stopped standbys or not");
    }

    /// Stops a new standby when it has been sent all it needs, and before it has taken that: from
    /// then on output waits for it. Says `words`, and hears `ok` when that standby has been given up.
    pub fn tell_while_the_standby_hangs(&mut self, words: &str) -> Result<()> {
        let standby = self.stop_a_standby_before_it_is_ready()?;
        self.tell(words)?;
        self.service.wait_for("another standby", |now| {
            now.is_protected() && now.standby_pid != Some(standby)
        })?;
        Ok(())
    }

    /// As [`Guest::stop_a_standby_in_its_fill`], in the short time in which the fill is marked
    /// complete and the standby is not ready.
    fn stop_a_standby_before_it_is_ready(&self) -> Result<i32> {
        /// Time enough for one that was not stopped in time to be said ready.
        const SAID: Duration = Duration::from_millis(500);
        for _ in 0..TRIES {
            let (marks, warm) = (self.marked_fills(), self.log_count("StandbyReady"));
            let standby = self.replace_standby()?;
            wait_until("the mark of a fill", PATIENCE, || {
                Ok((self.marked_fills() > marks).then_some(()))
            })?;
            send(standby, Signal::SIGSTOP)?;
            std::thread::sleep(SAID);
            if self.log_count("StandbyReady") == warm {
                return Ok(standby);
            }
            send(standby, Signal::SIGCONT)?;
            self.service.wait_protected()?;
        }
        bail!("{TRIES} standbys were ready before they could be stopped");
    }

    /// Kills the standby, and waits until another one is filled; its pid.
    fn replace_standby(&self) -> Result<i32> {
        let before = self.service.kill(Target::Standby, Signal::SIGKILL)?;
        let status = self.service.wait_for("a fill", |status| {
            let state = status.state.as_str();
            ["syncing", "protected"].contains(&state) && status.standby_pid != before.standby_pid
        })?;
        status
            .standby_pid
            .context("no standby is there to be filled")
    }

    /// How many fills have come to the epoch that completes them.
    fn marked_fills(&self) -> usize {
        self.log_count("FillMarked")
    }

    fn log_count(&self, event: &str) -> usize {
        self.service.log_text().matches(event).count()
    }

    /// All that a guest goes through which needs nothing of the host.
    pub fn go_through_all(mut self) -> Result<()> {
        self.set_up_and_check()?;
        self.stop()
    }

    /// Says a line after which the guest ends by itself; how `unbroken run` ends then.
    pub fn end_by(mut self, words: &str) -> Result<Ended> {
        writeln!(self.conversation.get_ref(), "{words}")?;
        let ended = self.service.wait_end()?;
        self.service.assert_gone()?;
        Ok(ended)
    }

    /// Signals `unbroken run`, which passes it on.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        send(self.service.front_pid(), signal)?;
        Ok(())
    }

    /// Ends the guest; nothing of it may be left.
    pub fn stop(self) -> Result<()> {
        self.end_by_stop().map(drop)
    }

    /// As [`Guest::stop`]; how `unbroken run` ended.
    pub fn end_by_stop(self) -> Result<Ended> {
        self.service.stop()
    }
}

/// Says a line to a guest and hears what it answers.
fn ask(conversation: &mut BufReader<TcpStream>, words: &str) -> Result<String> {
    conversation
        .get_ref()
        .write_all(format!("{words}\n").as_bytes())?;
    let mut answer = String::new();
    conversation.read_line(&mut answer)?;
    ensure!(answer.ends_with('\n'), "the connection ended");
    Ok(answer.trim_end().to_string())
}

/// A guest may run as another user.
fn open_to_all(directory: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o777))?;
    Ok(())
}

/// What every guest that needs nothing of the host goes through.
pub fn moved(program: &str) -> Result<()> {
    moved_with(program, &[])
}

/// As [`moved`], with more options of `unbroken run`.
pub fn moved_with(program: &str, options: &[&str]) -> Result<()> {
    Guest::start(program, options)?.go_through_all()
}
