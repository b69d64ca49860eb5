//! What this process may do.

use std::io::ErrorKind;

use userfaultfd::{Error, FeatureFlags, OpenRefusal, OpenWith, UffdBuilder};

use super::{Area, Check, State};

/// Creates a userfaultfd in each way. Returns whether any works, too.
pub(super) fn checks() -> (Vec<Check>, bool) {
    let scopes = [(true, "faults from user mode"), (false, "faults from kernel mode, too")];
    let ways = [(OpenWith::Device, "/dev/userfaultfd"), (OpenWith::Syscall, "userfaultfd(2)")];
    let mut checks = Vec::new();
    for (user_mode_only, scope) in scopes {
        for (with, way) in &ways {
            let mut builder = UffdBuilder::new();
            builder.close_on_exec(true).user_mode_only(user_mode_only).open_with(*with);
            checks.push(check(format!("{scope}, {way}"), builder.create().err()));
        }
    }
    let usable = checks.iter().any(|check| check.state == State::Yes);
    let forks = UffdBuilder::new().close_on_exec(true).require_features(FeatureFlags::EVENT_FORK).create();
    checks.push(check("events of forks".into(), forks.err()));
    (checks, usable)
}

fn check(name: String, refused: Option<Error>) -> Check {
    match refused {
        None => Check::new(Area::Rights, State::Yes, name, ""),
        Some(error) => {
            let mut check = Check::new(Area::Rights, State::No, name, reason(&error));
            check.remedies = error.remedies().map(str::to_owned).collect();
            check
        }
    }
}

fn reason(error: &Error) -> String {
    let errno = error.errno().map_or(String::new(), |errno| format!(" ({errno})"));
    match error {
        Error::OpenFailed(failure) => match failure.reason() {
            OpenRefusal::NotBuiltIn => {
                format!("the kernel has no userfaultfd, or a filter pretends so{errno}")
            }
            OpenRefusal::NotPermitted => format!("not permitted{errno}"),
            _ => format!("something else is in the way{errno}"),
        },
        Error::OpenDevUserfaultfd(error) if error.kind() == ErrorKind::NotFound => {
            format!("there is no such device{errno}: Linux 6.1 brought it")
        }
        Error::OpenDevUserfaultfd(_) => format!("the device can't be opened{errno}"),
        Error::FeatureNotPermitted(_) => format!("not permitted{errno}"),
        error => format!("{error}{errno}"),
    }
}
