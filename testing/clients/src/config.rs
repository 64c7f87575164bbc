//! Configurations of real servers for tests: foreground, no name lookups, no flood protection.

use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::User;

pub const IRC_PORT: u16 = 6667;
pub const ICECAST_PORT: u16 = 8000;
pub const REDIS_PORT: u16 = 6379;
pub const MEMCACHED_PORT: u16 = 11211;
pub const NGINX_PORT: u16 = 8080;

/// What nginx serves: `/small` and `/large` of these lengths.
pub const NGINX_SMALL_BYTES: usize = 128;
pub const NGINX_LARGE_BYTES: usize = 1 << 20;

/// The account and group that the Debian package of icecast2 makes.
const ICECAST_ACCOUNT: &str = "icecast2";

/// A command line: the program and its arguments.
pub type Command = Vec<String>;

fn words(words: &[&str]) -> Command {
    words.iter().map(ToString::to_string).collect()
}

/// Writes a configuration for ngircd into `directory`; returns the command that starts it.
///
/// Penalties are off (`MaxPenaltyTime = 0`), or the server would read a busy client only once a
/// second. Run by root it gives up root only for an account that exists; the test accounts do not
/// matter, so it is told to stay what it is.
pub fn ngircd(directory: &Path) -> io::Result<Command> {
    let file = directory.join("ngircd.conf");
    std::fs::write(
        &file,
        format!(
            "[Global]\n\
             Name = irc.unbroken.test\n\
             Info = unbroken test\n\
             AdminInfo1 = unbroken\n\
             MotdPhrase = \"unbroken\"\n\
             Listen = 0.0.0.0\n\
             Ports = {IRC_PORT}\n\
             ServerUID = root\n\
             ServerGID = root\n\
             [Limits]\n\
             MaxConnections = 0\n\
             MaxConnectionsIP = 0\n\
             MaxPenaltyTime = 0\n\
             PingTimeout = 30\n\
             PongTimeout = 30\n\
             [Options]\n\
             DNS = no\n\
             Ident = no\n\
             PAM = no\n\
             SyslogFacility = local1\n"
        ),
    )?;
    Ok(words(&[
        "/usr/sbin/ngircd",
        "-n",
        "-f",
        &file.to_string_lossy(),
    ]))
}

/// Writes a configuration for icecast2 into `directory`; returns the command that starts it.
///
/// The server refuses to run as root, so it is told to become the account that its package makes,
/// and the log directory is handed to that account.
pub fn icecast(directory: &Path) -> io::Result<Command> {
    let account = User::from_name(ICECAST_ACCOUNT)?.ok_or_else(|| {
        let why = format!("no account {ICECAST_ACCOUNT}: run `apt-get install icecast2`");
        io::Error::new(io::ErrorKind::NotFound, why)
    })?;
    let logs = directory.join("icecast-logs");
    std::fs::create_dir_all(&logs)?;
    std::os::unix::fs::chown(
        &logs,
        Some(account.uid.as_raw()),
        Some(account.gid.as_raw()),
    )?;
    let file = directory.join("icecast.xml");
    std::fs::write(
        &file,
        format!(
            "<icecast>
  <location>test</location><admin>test@localhost</admin><hostname>localhost</hostname>
  <limits>
    <clients>20000</clients><sources>4</sources>
    <queue-size>8388608</queue-size><burst-on-connect>1</burst-on-connect>
    <burst-size>16384</burst-size>
    <client-timeout>60</client-timeout><header-timeout>30</header-timeout>
    <source-timeout>60</source-timeout>
  </limits>
  <authentication>
    <source-password>secret</source-password><relay-password>secret</relay-password>
    <admin-user>admin</admin-user><admin-password>secret</admin-password>
  </authentication>
  <listen-socket><port>{ICECAST_PORT}</port></listen-socket>
  <fileserve>0</fileserve>
  <paths>
    <basedir>{base}</basedir><logdir>{logs}</logdir>
    <webroot>/usr/share/icecast2/web</webroot><adminroot>/usr/share/icecast2/admin</adminroot>
  </paths>
  <logging><accesslog>access.log</accesslog><errorlog>error.log</errorlog>
    <loglevel>2</loglevel></logging>
  <security><chroot>0</chroot>
    <changeowner><user>{ICECAST_ACCOUNT}</user><group>icecast</group></changeowner></security>
</icecast>
",
            base = directory.display(),
            logs = logs.display(),
        ),
    )?;
    Ok(words(&["/usr/bin/icecast2", "-c", &file.to_string_lossy()]))
}

/// The command that starts redis-server with nothing on disk.
pub fn redis(directory: &Path) -> Command {
    words(&[
        "/usr/bin/redis-server",
        "--port",
        &REDIS_PORT.to_string(),
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
        "--dir",
        &directory.to_string_lossy(),
    ])
}

/// The command that starts memcached with its usual four threads.
pub fn memcached() -> Command {
    words(&[
        "/usr/bin/memcached",
        "-u",
        "root",
        "-l",
        "0.0.0.0",
        "-p",
        &MEMCACHED_PORT.to_string(),
        "-m",
        "256",
        "-c",
        "4096",
    ])
}

/// Writes a configuration for nginx as one process, and two files to serve, into `directory`;
/// returns the command that starts it.
pub fn nginx(directory: &Path) -> io::Result<Command> {
    std::fs::write(directory.join("small"), vec![b's'; NGINX_SMALL_BYTES])?;
    std::fs::write(directory.join("large"), vec![b'l'; NGINX_LARGE_BYTES])?;
    let file = directory.join("nginx.conf");
    std::fs::write(
        &file,
        format!(
            "daemon off;
master_process off;
user root;
pid {base}/nginx.pid;
error_log {base}/nginx-error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_body_temp_path {base}/body;
  proxy_temp_path {base}/proxy;
  fastcgi_temp_path {base}/fastcgi;
  uwsgi_temp_path {base}/uwsgi;
  scgi_temp_path {base}/scgi;
  server {{ listen 0.0.0.0:{NGINX_PORT} backlog=4096; root {base}; }}
}}
",
            base = directory.display(),
        ),
    )?;
    Ok(words(&[
        "/usr/sbin/nginx",
        "-p",
        &directory.to_string_lossy(),
        "-c",
        &file.to_string_lossy(),
    ]))
}

/// One of our own small programs, which stand beside the running one, with its one argument: the
/// port of a server.
pub fn own_program(name: &str, argument: impl ToString) -> io::Result<Command> {
    let program = find_own_program(name)?;
    Ok(words(&[&program.to_string_lossy(), &argument.to_string()]))
}

/// A program of our own by its name. Test programs stand one directory deeper (`deps`) than programs.
pub fn find_own_program(name: &str) -> io::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let found = this
        .ancestors()
        .skip(1)
        .take(2)
        .map(|place| place.join(name));
    found.into_iter().find(|path| path.exists()).ok_or_else(|| {
        let why = format!("{name} is not built: run `cargo build --workspace --bins`");
        io::Error::new(io::ErrorKind::NotFound, why)
    })
}
