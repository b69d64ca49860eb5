//! A socket that systemd hands to a service.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use userfaultfd::handoff::{Error, Listener, PeerError};

use crate::monitor::path;
use crate::support::{require, test_name};

/// Set in the process that is handed the socket.
const STAGE: &str = "USERFAULTFD_TEST_INHERITS";

#[test]
fn socket_of_systemd_is_found_by_its_number_and_name() {
    require!();
    if std::env::var_os(STAGE).is_some() {
        assert!(matches!(Listener::inherited(Some("another")), Err(Error::Inherited { .. })));
        let mut listener = Listener::inherited(Some("pager")).unwrap();
        let error = listener.accept().unwrap_err();
        assert!(matches!(error, Error::Peer { error: PeerError::Closed { received: 0 }, .. }), "{error:?}");
        return;
    }
    assert!(matches!(Listener::inherited(None), Err(Error::Inherited { .. })));
    let path = path();
    let listener = UnixListener::bind(&path).unwrap();
    let stream = UnixStream::connect(&path).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    std::fs::remove_file(path).unwrap();
    // As systemd does it: the number 3, and this process's id.
    let script =
        "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=pager; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .args([test_name!(), "--exact", "--nocapture", "--test-threads=1"])
        .env(STAGE, "1")
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}
