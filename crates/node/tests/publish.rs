//! `--publish` against the kernel: a host and a service in network namespaces of the test's own,
//! joined by a veth pair that stands for the TUN device.
//!
//! A test process cannot change its own namespace without its neighbours, so the test starts
//! itself again under unshare(1) and nsenter(1), with the part to play in an environment variable.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use unbroken_node::directory::ServiceName;
use unbroken_node::publish::{PublishError, PublishedPort, Target, publish, withdraw};

const PART: &str = "UNBROKEN_TEST_PART";

/// This test again, in `part`, through `wrapper`.
fn again(wrapper: &[&str], part: &str) -> Command {
    let this = std::env::current_exe().expect("own path");
    let mut command = Command::new(wrapper[0]);
    command
        .args(&wrapper[1..])
        .arg(this)
        .args([
            "--exact",
            "published_ports_lead_to_the_service",
            "--nocapture",
        ])
        .env(PART, part);
    command
}

#[test]
fn published_ports_lead_to_the_service() {
    match std::env::var(PART).as_deref() {
        Ok("host") => host(),
        Ok("service") => service(),
        _ => {
            let status = again(&["unshare", "--net"], "host").status();
            assert!(status.expect("unshare(1) of util-linux").success());
        }
    }
}

/// Listens in the service's namespace and tells each client its address, until stdin closes.
fn service() {
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("go");
    for address in ["10.211.0.2:6667", "[fd75::2]:6667"] {
        let listener = TcpListener::bind(address).expect(address);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let mut client: TcpStream = client;
                let address = client.peer_addr().map(|address| address.ip());
                let _ = client.write_all(format!("{address:?}").as_bytes());
            }
        });
    }
    println!("listening");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ip(command: &str) {
    let status = Command::new("ip").args(command.split(' ')).status();
    assert!(status.expect("ip(8)").success(), "ip {command}");
}

/// Reads lines, among them those of the test harness, until `wanted`.
fn wait_for(lines: &mut impl BufRead, wanted: &str) {
    let mut line = String::new();
    while !line.trim_end().ends_with(wanted) {
        line.clear();
        assert_ne!(lines.read_line(&mut line).expect("read"), 0, "no {wanted}");
    }
}

/// What the service says when asked at `address`; `None` when nobody answers there.
fn ask(address: &str) -> Option<String> {
    let address: SocketAddr = address.parse().expect("address");
    let mut client = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    let mut answer = String::new();
    client.read_to_string(&mut answer).ok()?;
    Some(answer)
}

fn seen_as(address: &str) -> Option<String> {
    let address: IpAddr = address.parse().expect("address");
    Some(format!("Ok({address})"))
}

fn host() {
    let mut child = again(&["unshare", "--net"], "service")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare(1)");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout"));
    let pid = child.id();
    let mut service = Service(child);
    wait_for(&mut lines, "ready");
    ip("link set lo up");
    ip(&format!("link add ub0 type veth peer name s0 netns {pid}"));
    ip("addr add 10.211.0.1/30 dev ub0");
    ip("link set ub0 up");
    ip("-6 addr add fd75::1/64 dev ub0 nodad");
    let inside = |command: &str| {
        let status = Command::new("nsenter")
            .args(["--net", "--target", &pid.to_string(), "ip"])
            .args(command.split(' '))
            .status();
        assert!(
            status.expect("nsenter(1)").success(),
            "inside: ip {command}"
        );
    };
    inside("addr add 10.211.0.2/30 dev s0");
    inside("link set s0 up");
    inside("-6 addr add fd75::2/64 dev s0 nodad");
    let stdin = service.0.stdin.as_mut().expect("stdin");
    stdin.write_all(b"go\n").expect("go");
    wait_for(&mut lines, "listening");
    publish_and_ask();
}

fn publish_and_ask() {
    let name = ServiceName::new("pub-test").expect("name");
    let target = Target {
        device: "ub0",
        ipv4: Some("10.211.0.2".parse().expect("address")),
        ipv6: Some("fd75::2".parse().expect("address")),
    };
    let ports = |texts: &[&str]| -> Vec<PublishedPort> {
        let parse = |text: &&str| text.parse().expect("port");
        texts.iter().map(parse).collect()
    };

    let warnings = publish(&name, &target, &ports(&["7000:6667"])).expect("publish");
    assert_eq!(warnings.len(), 1, "a new namespace does not forward");
    assert_eq!(ask("127.0.0.1:7000"), seen_as("10.211.0.1"));
    assert_eq!(ask("127.9.9.9:7000"), seen_as("10.211.0.1"));
    assert_eq!(ask("10.211.0.1:7000"), seen_as("10.211.0.1"));
    assert_eq!(ask("[::1]:7000"), seen_as("fd75::1"));
    assert_eq!(ask("[fd75::1]:7000"), seen_as("fd75::1"));
    assert_eq!(ask("127.0.0.1:7001"), None);

    // The same name again replaces everything, as after a service that died without a word.
    publish(
        &name,
        &target,
        &ports(&["127.0.0.1:7001:6667", "[::1]:6667"]),
    )
    .expect("again");
    assert_eq!(ask("127.0.0.1:7000"), None);
    assert_eq!(ask("127.0.0.1:7001"), seen_as("10.211.0.1"));
    assert_eq!(ask("127.9.9.9:7001"), None);
    assert_eq!(ask("[::1]:6667"), seen_as("fd75::1"));

    withdraw(&name).expect("withdraw");
    withdraw(&name).expect("nothing to withdraw");
    assert_eq!(ask("127.0.0.1:7001"), None);
    let left = Command::new("nft").args(["list", "tables"]).output();
    assert!(left.expect("nft").stdout.is_empty());

    let taken = TcpListener::bind("127.0.0.1:7002").expect("bind");
    let error = publish(&name, &target, &ports(&["7002:6667"])).expect_err("in use");
    assert!(matches!(error, PublishError::InUse(_)), "{error}");
    drop(taken);
}
