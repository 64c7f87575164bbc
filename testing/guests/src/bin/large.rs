//! More memory than there is room for on the way to a standby, all of it written by every check:
//! with a standby that lags, an epoch goes in parts. Each page counts the checks, so one that is
//! newer than its neighbours is found out by the next.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::{Guest, Place, main as run, same};

const PAGES: usize = 50_000;
/// In each page, behind its count.
const SCRATCH_AT: usize = size_of::<u64>();

struct Large {
    area: Arc<Area>,
    pages: usize,
    checks: u64,
    /// Told to the thread that writes all the time, if there is one.
    enough: Arc<AtomicBool>,
}

impl Guest for Large {
    fn set_up(_: &Place) -> Result<Self> {
        Ok(Self {
            area: Arc::new(Area::private(PAGES)?),
            pages: PAGES,
            checks: 0,
            enough: Arc::default(),
        })
    }

    fn check(&mut self) -> Result<()> {
        for page in 0..self.pages {
            let count = self.count(page) + 1;
            self.area.write(page * PAGE, &count.to_le_bytes());
        }
        self.checks += 1;
        for page in 0..self.pages {
            same(
                &format!("count of page {page}"),
                self.count(page),
                self.checks,
            )?;
        }
        Ok(())
    }

    fn step(&mut self, words: &str) -> Result<()> {
        match words {
            "halve" => self.halve(),
            "write on" => self.write_on(),
            "enough" => {
                self.enough.store(true, Ordering::Relaxed);
                Ok(())
            }
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

impl Large {
    /// Less than there is room for on the way.
    fn halve(&mut self) -> Result<()> {
        (self.pages, self.checks) = (PAGES / 2, 0);
        self.area = Arc::new(Area::private(self.pages)?);
        Ok(())
    }

    /// From now on every page is written again and again, beside its count: a fill comes to no end
    /// by itself, and the epoch that completes it has nearly all of them.
    fn write_on(&mut self) -> Result<()> {
        self.enough = Arc::default();
        let (area, enough) = (Arc::clone(&self.area), Arc::clone(&self.enough));
        std::thread::spawn(move || {
            while !enough.load(Ordering::Relaxed) {
                for page in 0..area.pages() {
                    area.write(page * PAGE + SCRATCH_AT, &[1]);
                }
            }
        });
        Ok(())
    }

    fn count(&self, page: usize) -> u64 {
        let bytes = self.area.read(page * PAGE, size_of::<u64>());
        bytes
            .iter()
            .rev()
            .fold(0, |count, byte| count << 8 | u64::from(*byte))
    }
}

fn main() -> ExitCode {
    run::<Large>()
}
