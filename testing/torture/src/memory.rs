//! Out of memory, for one process alone: the kernel's own killer meets it in a control group that
//! has no room.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use unbroken_harness::{PATIENCE, wait_until};

/// Room for the process that uses it up.
const ROOM_BYTES: u64 = 8 << 20;
const HELD_BYTES: u64 = 4_000_000;
/// The victim goes first, whatever else is in the group.
const KILLED_FIRST: &str = "1000";

/// A control group with a limit on memory, gone on drop.
struct Group {
    path: PathBuf,
    kind: Kind,
    /// Ours, where its processes go when it goes.
    home: PathBuf,
}

impl Group {
    fn new(purpose: &str) -> Result<Self> {
        let (home, parent, kind) = own_group()?;
        let path = parent.join(format!("torture-{}-{purpose}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let group = Self { path, kind, home };
        group.write(kind.limit, &ROOM_BYTES.to_string())?;
        Ok(group)
    }

    fn used_bytes(&self) -> Result<u64> {
        let text = fs::read_to_string(self.path.join(self.kind.used))?;
        text.trim()
            .parse()
            .context("the use of memory is no number")
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value)
            .with_context(|| format!("cannot write {value} to {}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Whoever the victim started before it died has nothing to do with this.
        let left = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in left.lines() {
            let _ = fs::write(self.home.join("cgroup.procs"), pid);
        }
        // A process that is being reaped holds it a moment longer.
        let _ = wait_until("an empty control group", PATIENCE, || {
            Ok(fs::remove_dir(&self.path).ok())
        });
    }
}

/// What the files of a group are called.
#[derive(Debug, Clone, Copy)]
struct Kind {
    limit: &'static str,
    used: &'static str,
}

const OLD: Kind = Kind {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
};
const UNIFIED: Kind = Kind {
    limit: "memory.max",
    used: "memory.current",
};

/// Our group, and the one in which groups can be made.
fn own_group() -> Result<(PathBuf, PathBuf, Kind)> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let path = path.trim_start_matches('/');
        if controllers
            .split(',')
            .any(|controller| controller == "memory")
        {
            let own = Path::new("/sys/fs/cgroup/memory").join(path);
            return Ok((own.clone(), own, OLD));
        }
        let unified = Path::new("/sys/fs/cgroup").join(path);
        if controllers.is_empty() && unified.join("memory.current").exists() {
            // A group with processes cannot have limited children: its parent can.
            let parent = unified.parent().map(Path::to_path_buf);
            let parent = parent.context("no control group above ours")?;
            return Ok((unified, parent, UNIFIED));
        }
    }
    bail!("no control group limits memory here")
}

/// A process group that uses up memory in the control group.
struct Hog(Child);

impl Hog {
    /// `tail` keeps what it may have to print at the end, which never comes.
    fn start(group: &Group, script: &str) -> Result<Self> {
        let join = format!(
            "echo $$ > {}/cgroup.procs && {script}",
            group.path.display()
        );
        let shell = Command::new("/bin/sh")
            .args(["-c", &join])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start /bin/sh")?;
        Ok(Self(shell))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        // Reaped only after the signal, so the group's number is still theirs.
        let _ = killpg(Pid::from_raw(self.0.id() as i32), Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Whether the kernel's killer can be called here; the error says why not.
pub fn can_run_out() -> Result<()> {
    Group::new("probe").map(drop)
}

/// Lets the kernel kill `pid` for want of memory. `purpose` is a name that no other group has now.
pub fn run_out(pid: i32, purpose: &str) -> Result<()> {
    let group = Group::new(purpose)?;
    let score = format!("/proc/{pid}/oom_score_adj");
    let victim = fs::write(&score, KILLED_FIRST)
        .and_then(|()| fs::write(group.path.join("cgroup.procs"), pid.to_string()));
    if victim.is_err() && !Path::new(&format!("/proc/{pid}")).exists() {
        return Ok(());
    }
    victim.with_context(|| format!("cannot put {pid} into {}", group.path.display()))?;
    // The killer's choice is the largest, and the victim counts as if it had all the room. So that
    // no hog comes near that, one holds a part of it before the other wants the rest and more.
    let holder = Hog::start(&group, &format!("cat /dev/zero | tail -c {HELD_BYTES}"))?;
    wait_until("some memory to be used", PATIENCE, || {
        Ok((group.used_bytes()? > HELD_BYTES * 3 / 4).then_some(()))
    })?;
    let mut taker = Hog::start(&group, "exec tail /dev/zero")?;
    let members = group.path.join("cgroup.procs");
    let died = wait_until("the kernel to kill it", PATIENCE, || {
        let members = fs::read_to_string(&members)?;
        let alive = members.lines().any(|member| member == pid.to_string());
        Ok((!alive).then_some(()))
    });
    // What the victim held may not be free before the hog wants more: then it goes as well.
    let end = taker.0.try_wait()?;
    drop(holder);
    died.with_context(|| format!("process {pid}; the hog: {end:?}"))
}
