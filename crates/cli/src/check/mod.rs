//! `unbroken check`: what this machine can do, each point tried and not guessed, with the exact
//! fix for what it cannot. `run` asks the same before it starts anything.

mod points;

use crate::exit::{Exit, Failure};
use serde_json::{Value, json};
use std::fmt::Write;

/// How one point stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// Works without, but not as well.
    Warning {
        cause: String,
        fix: String,
    },
    /// Does not work without.
    Missing {
        cause: String,
        fix: String,
        exit: Exit,
    },
}

/// One point and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is needed, for a reader who knows Linux.
    pub subject: String,
    pub verdict: Verdict,
}

impl Finding {
    fn word(&self) -> &'static str {
        match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning { .. } => "warning",
            Verdict::Missing { .. } => "missing",
        }
    }

    fn cause_and_fix(&self) -> Option<(&str, &str)> {
        match &self.verdict {
            Verdict::Ok => None,
            Verdict::Warning { cause, fix } | Verdict::Missing { cause, fix, .. } => {
                Some((cause, fix))
            }
        }
    }
}

/// Tries every point.
pub fn findings() -> Vec<Finding> {
    points::all()
}

/// Refuses what cannot work, before anything is started.
///
/// # Errors
/// The first missing point, with its fix.
pub fn before_run() -> Result<(), Failure> {
    match findings().iter().find_map(missing) {
        Some((subject, cause, fix, exit)) => Err(Failure::new(
            exit,
            format!("cannot run a service: {subject}: {cause}; {fix}"),
        )),
        None => Ok(()),
    }
}

fn missing(finding: &Finding) -> Option<(&str, &str, &str, Exit)> {
    match &finding.verdict {
        Verdict::Missing { cause, fix, exit } => Some((&finding.subject, cause, fix, *exit)),
        _ => None,
    }
}

/// The exit code of `check`: that of the first missing point.
pub fn outcome(findings: &[Finding]) -> Option<Exit> {
    findings.iter().find_map(missing).map(|(.., exit)| exit)
}

/// One line a point, and a verdict.
pub fn table(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let _ = write!(text, "{:<8} {}", finding.word(), finding.subject);
        if let Some((cause, fix)) = finding.cause_and_fix() {
            let _ = write!(text, ": {cause}; {fix}");
        }
        text.push('\n');
    }
    text.push_str(match outcome(findings) {
        None => "This machine can protect services.\n",
        Some(_) => "This machine cannot protect services until what is missing is fixed.\n",
    });
    text
}

/// `[{"subject", "verdict", "cause", "fix"}, ...]`; cause and fix are null when it is ok.
pub fn json(findings: &[Finding]) -> Value {
    findings
        .iter()
        .map(|finding| {
            let (cause, fix) = finding.cause_and_fix().unzip();
            json!({
                "subject": finding.subject,
                "verdict": finding.word(),
                "cause": cause,
                "fix": fix,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(verdict: Verdict) -> Finding {
        Finding {
            subject: "the thing".into(),
            verdict,
        }
    }

    #[test]
    fn verdicts_are_shown_with_cause_and_fix() {
        let findings = [
            finding(Verdict::Ok),
            finding(Verdict::Warning {
                cause: "slow".into(),
                fix: "hurry".into(),
            }),
            finding(Verdict::Missing {
                cause: "gone".into(),
                fix: "find it".into(),
                exit: Exit::Machine,
            }),
        ];
        assert_eq!(
            table(&findings),
            "ok       the thing\n\
             warning  the thing: slow; hurry\n\
             missing  the thing: gone; find it\n\
             This machine cannot protect services until what is missing is fixed.\n"
        );
        assert_eq!(outcome(&findings), Some(Exit::Machine));
        assert_eq!(outcome(&findings[..2]), None);
        let json = json(&findings);
        assert_eq!(json[0]["fix"], Value::Null);
        assert_eq!(json[2]["verdict"], "missing");
        assert_eq!(json[2]["fix"], "find it");
    }

    /// Tests run as root on a supported kernel.
    #[test]
    fn this_machine_passes() {
        let findings = findings();
        assert_eq!(outcome(&findings), None, "{}", table(&findings));
        assert!(before_run().is_ok());
    }
}
