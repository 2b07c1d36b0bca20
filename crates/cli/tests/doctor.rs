//! `farlink doctor`: that it sees what is there, and what a machine lacks on purpose.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod common;

use common::{Farlink, available};
use serde_json::Value;
use std::process::Command;

fn doctor() -> Farlink {
    Farlink::new().args(["doctor", "--json"])
}

/// What the doctor says of a mechanism.
fn finding<'a>(report: &'a Value, name: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// Runs the doctor where farlink can run; gives the report.
fn report(doctor: Farlink) -> Value {
    let output = doctor.output();
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output:?}");
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(report["can_run"], true);
    report
}

/// Where everything else is tested the mechanisms that the tests stand on work, in both forms of the report, and every
/// finding says what farlink does about it.
#[test]
fn sees_what_is_there() {
    let report = report(doctor());
    for name in
        ["code in memory without a name", "--memory shared", "--memory posix", "--memory remote", "C", "assembly"]
    {
        assert_eq!(finding(&report, name)["status"], "works", "{report:#}");
    }
    let findings = report["findings"].as_array().unwrap();
    assert!(findings.iter().all(|finding| !finding["farlink"].as_str().unwrap().is_empty()));
    let output = Farlink::new().arg("doctor").output();
    assert_eq!(output.code, Some(0));
    for finding in findings {
        let line = format!("  {:<7}  {}", finding["status"].as_str().unwrap(), finding["name"].as_str().unwrap());
        assert!(output.stdout.lines().any(|shown| shown.starts_with(&line)), "{line:?} is not in {}", output.stdout);
    }
    assert!(!output.stdout.contains('\x1b'), "no colours in a pipe");
}

/// A /dev/shm that code cannot run from is no obstacle, but for POSIX shared memory; both are said, with the reason.
#[test]
fn sees_a_noexec_dev_shm() {
    let can_mount = || Command::new("unshare").args(["-rm", "true"]).status().is_ok_and(|status| status.success());
    if !available("sees_a_noexec_dev_shm", "unshare") || !can_mount() {
        eprintln!("SKIPPED sees_a_noexec_dev_shm: this user may not mount anything");
        return;
    }
    let remount = "mount -t tmpfs -o noexec,size=16m tmpfs /dev/shm && exec \"$@\"";
    let report = report(doctor().through(&["unshare", "-rm", "sh", "-c", remount, "sh"]));
    let code = finding(&report, "code in POSIX shared memory (/dev/shm)");
    assert_eq!(code["status"], "fails");
    assert!(code["seen"].as_str().unwrap().contains("mounted noexec"), "{code}");
    assert_eq!(finding(&report, "/dev/shm")["status"], "limited");
    assert_eq!(finding(&report, "--memory posix")["status"], "fails");
    assert_eq!(finding(&report, "--memory shared")["status"], "works");
}

/// Too little address space and missing tools are told apart from what works.
#[test]
fn sees_what_is_missing() {
    if !available("sees_what_is_missing", "prlimit") {
        return;
    }
    let doctor = doctor().through(&["/usr/bin/prlimit", "--as=1000000000"]).env("PATH", "/nowhere");
    let report = report(doctor);
    let space = finding(&report, "1 GiB of address space at once");
    assert_eq!(space["status"], "fails");
    assert!(space["seen"].as_str().unwrap().contains("memory"), "{space}");
    assert_eq!(finding(&report, "--memory shared")["status"], "works");
    for tool in ["C", "Rust", "gdb", "perf"] {
        assert_eq!(finding(&report, tool)["status"], "limited", "{report:#}");
        assert!(finding(&report, tool)["seen"].as_str().unwrap().contains("cannot be run"), "{report:#}");
    }
}

/// Where no executor can be run the exit status is farlink's own, and the report says why.
#[test]
fn fails_where_nothing_can_run() {
    let output = doctor().args(["--executor", "/bin/true"]).output();
    assert_eq!(output.code, Some(125), "{output:?}");
    let report: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(report["can_run"], false);
    let way = finding(&report, "--memory shared");
    assert_eq!(way["status"], "fails");
    assert!(way["seen"].as_str().unwrap().contains("/bin/true"), "{way}");
}
