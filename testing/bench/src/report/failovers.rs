//! The kills of a section: each as a timeline.

use super::plot;
use crate::model::Section;

pub fn all(section: &Section) -> String {
    section.failovers.iter().map(plot::failover).collect()
}
