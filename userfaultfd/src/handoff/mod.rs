//! Memory that another process hands over: virtual machine monitors, and CRIU.
//!
//! A monitor that restores a virtual machine lazily registers its memory with a userfaultfd, connects to a Unix socket,
//! and sends the descriptor with a description of the memory. This module has both ends: [`Listener`] for the handler,
//! which gives the [`Handoff`] to a pager ([`Pager::serve`](crate::pager::Pager::serve)), and [`send`] for monitors. [`Server`]
//! is the handler's loop: arrivals, messages and ends of any number of virtual machines, in one thread.
//!
//! # Dialects
//!
//! | [`Dialect`] | recognised | confirmed | descriptors |
//! | --- | --- | --- | --- |
//! | [`Firecracker`](Dialect::Firecracker) | by `[` | no | userfaultfd |
//! | [`E2b`](Dialect::E2b) | by `[` and a memfd | no | userfaultfd, memfd |
//! | [`Nydus`](Dialect::Nydus) | by `{` | no | userfaultfd |
//! | [`CloudHypervisor`](Dialect::CloudHypervisor) | by a length and `{` | a byte | userfaultfd |
//! | [`CloudHypervisorBackend`](Dialect::CloudHypervisorBackend) | by its header | no | userfaultfd, a file for each region |
//! | [`CloudHypervisorPageFault`](Dialect::CloudHypervisorPageFault) | by its header | | none |
//! | [`CodeSandbox`](Dialect::CodeSandbox) | no | two bytes | memfd to the monitor, userfaultfd |
//! | [`Criu`](Dialect::Criu) | no | no | userfaultfd |
//!
//! Messages are parsed as a stream: one may arrive in parts, or two at once, with the descriptors at any part.
//! Unknown fields are ignored. An unknown message is an error that shows it. [`Decoder`] is the parser without a socket.
//!
//! # How a virtual machine ends
//!
//! The memory waits from before the monitor connects: a vCPU that touches it sleeps until the page is filled. If nothing
//! ever fills it, the machine hangs; if its userfaultfd is closed everywhere, it reads zeros. So what was handed over and
//! can't be served ends its process: [`OnEnd`].
//!
//! # A handler that dies
//!
//! The memory of a virtual machine waits while no handler is there, as its monitor keeps its own userfaultfd. With
//! [`PagerBuilder::state`](crate::pager::PagerBuilder::state) another handler can go on: [`adopt`] takes the userfaultfd from the
//! process, and the states of its pages from a file. A handler that still lives hands over by
//! [`detach`](ServedProcess::detach): its [`description`](Handoff::description) is serialised, and sent with the
//! descriptors.
//!
//! # When not to use it
//!
//! To run many clones of one snapshot on one host, a private mapping of the snapshot's file takes less memory than pages
//! that are copied in by userfaultfd: the clones share what they only read. Userfaultfd is for content that isn't a local
//! file, for huge pages, and for a record of what is used.

mod connection;
mod criu;
mod decoder;
mod dialect;
mod error;
mod framing;
mod handed;
mod limits;
mod listener;
mod message;
mod orphan;
mod process;
mod region;
mod send;
mod serve;
mod server;
mod succession;

pub use self::connection::{Connection, Received};
pub use self::criu::{CriuError, CriuImages, CriuMemory, CriuServed};
pub use self::decoder::Decoder;
pub use self::dialect::Dialect;
pub use self::error::{Error, PeerError};
pub use self::handed::{Description, Handoff, Parts};
pub use self::listener::Listener;
pub use self::message::Message;
pub use self::process::{Credentials, Process};
pub use self::region::MemoryRegion;
pub use self::send::{Offer, receive_memory, send, send_message};
pub use self::serve::{
    ProcessRecorder, ProcessReplay, ProcessStatistics, ServeError, ServedProcess, Unserved,
};
pub use self::server::{Server, ServerEvent};
pub use self::succession::{AdoptError, Unadopted, adopt, adopt_with, left_behind};
pub use crate::pager::OnEnd;
