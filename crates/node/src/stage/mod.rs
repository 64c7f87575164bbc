pub mod announcement;
mod rules;
pub mod seccomp_filter;
pub mod syscalls;
