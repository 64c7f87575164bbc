//! How long a small request waits for its answer, over one connection.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use serde::Serialize;

use crate::running::{ClientError, PATIENCE};

/// Answer times in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub samples: usize,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

/// Sends `samples` requests of `bytes` one after the other to a [`crate::serve`] echo server and
/// checks each answer.
pub fn measure(address: SocketAddr, samples: usize, bytes: usize) -> Result<Latency, ClientError> {
    let times_us = exchange(address, samples, bytes)
        .map_err(|cause| ClientError::Connect { address, cause })?;
    let at = |share: f64| {
        let index = ((times_us.len() as f64 - 1.0) * share).round() as usize;
        times_us.get(index).copied().unwrap_or(0.0)
    };
    Ok(Latency {
        samples: times_us.len(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        max_us: at(1.0),
    })
}

fn exchange(address: SocketAddr, samples: usize, bytes: usize) -> io::Result<Vec<f64>> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut times_us = Vec::with_capacity(samples);
    for number in 0..samples {
        let mut request = format!("{number:0width$}", width = bytes.max(1) - 1).into_bytes();
        request.push(b'\n');
        let mut answer = vec![0; request.len()];
        let begun = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
        times_us.push(begun.elapsed().as_secs_f64() * 1e6);
        if answer != request {
            return Err(io::Error::other(format!(
                "answer {number} is not the request"
            )));
        }
    }
    times_us.sort_by(f64::total_cmp);
    Ok(times_us)
}
