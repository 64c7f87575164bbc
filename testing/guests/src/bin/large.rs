//! More memory than there is room for on the way to a standby, all of it written by every check:
//! with a standby that lags, an epoch goes in parts. Each page counts the checks, so one that is
//! newer than its neighbours is found out by the next.

use std::process::ExitCode;

use anyhow::{Result, bail};
use unbroken_guests::area::{Area, PAGE};
use unbroken_guests::{Guest, Place, main as run, same};

const PAGES: usize = 50_000;

struct Large {
    area: Area,
    pages: usize,
    checks: u64,
}

impl Guest for Large {
    fn set_up(_: &Place) -> Result<Self> {
        Ok(Self {
            area: Area::private(PAGES)?,
            pages: PAGES,
            checks: 0,
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
            _ => bail!("this guest does not know {words:?}"),
        }
    }
}

impl Large {
    /// Less than there is room for on the way.
    fn halve(&mut self) -> Result<()> {
        (self.pages, self.checks) = (PAGES / 2, 0);
        self.area = Area::private(self.pages)?;
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
