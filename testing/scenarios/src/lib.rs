//! The scenario suite lives in tests/: one test a scenario.
