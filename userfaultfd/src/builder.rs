//! How a [`Uffd`] is made: opened as asked, then the handshake about features.

use std::os::fd::{AsFd, OwnedFd};

use crate::open::{self, OpenFlags, OpenWith};
use crate::uffd::Terms;
use crate::{Errno, Error, FeatureFlags, IoctlFlags, Result, Support, Uffd, sys};

/// Makes [`Uffd`]s.
///
/// ```
/// use userfaultfd::{FeatureFlags, UffdBuilder};
///
/// let uffd = UffdBuilder::new()
///     .close_on_exec(true)
///     .non_blocking(true)
///     .require_features(FeatureFlags::MISSING_SHMEM)
///     .request_features(FeatureFlags::THREAD_ID | FeatureFlags::RWP)
///     .create()?;
/// assert!(uffd.features().contains(FeatureFlags::MISSING_SHMEM));
/// println!("got {}", uffd.features());
/// # Ok::<(), userfaultfd::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct UffdBuilder {
    open_with: OpenWith,
    flags: OpenFlags,
    wanted: Wanted,
}

impl Default for UffdBuilder {
    /// The same as [`UffdBuilder::new`].
    fn default() -> Self {
        Self::new()
    }
}

impl UffdBuilder {
    /// A builder that opens by [`OpenWith::Auto`], for faults from user mode only, blocking, not closed on
    /// exec, and asks for nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            open_with: OpenWith::Auto,
            flags: OpenFlags { user_mode_only: true, ..OpenFlags::default() },
            wanted: Wanted::default(),
        }
    }

    /// Whether the descriptor is closed by execve(2). The default is `false`.
    #[doc(alias = "O_CLOEXEC")]
    pub fn close_on_exec(&mut self, close_on_exec: bool) -> &mut Self {
        self.flags.close_on_exec = close_on_exec;
        self
    }

    /// Whether reading returns at once when there is no event, instead of waiting for one. The default is
    /// `false`.
    ///
    /// poll(2) and epoll(7) work only on a non-blocking descriptor; on a blocking one they report an error, which is
    /// taken for "readable". So an event loop or a task of an async runtime, which must never wait in a read, takes
    /// `true`: with `false` the first read without an event holds up its thread, and all that runs there, without a
    /// word. [`Uffd::try_read_event`] answers with an error instead.
    #[doc(alias = "O_NONBLOCK")]
    pub fn non_blocking(&mut self, non_blocking: bool) -> &mut Self {
        self.flags.non_blocking = non_blocking;
        self
    }

    /// Whether only faults from user mode are handled. The default is `true`, which needs no rights.
    ///
    /// With `true`, a system call that is given a missing page (read(2) into it, say) fails with `EFAULT`,
    /// and KVM guests can't run on the memory: a missing page that the guest meets is no fault of a thread, but ends
    /// `KVM_RUN` with `EFAULT`, or with `KVM_EXIT_INTERNAL_ERROR` (an `InternalError` of VM monitors) where KVM emulates
    /// the instruction. Neither says why. With `false` such faults are delivered too, which takes
    /// access to `/dev/userfaultfd`, `CAP_SYS_PTRACE`, or the sysctl `vm.unprivileged_userfaultfd=1`.
    ///
    /// Before Linux 5.11 there is no such restriction to ask for, and all faults are delivered.
    #[doc(alias = "UFFD_USER_MODE_ONLY")]
    pub fn user_mode_only(&mut self, user_mode_only: bool) -> &mut Self {
        self.flags.user_mode_only = user_mode_only;
        self
    }

    /// Features without which no [`Uffd`] is made. Adds to those required before.
    ///
    /// A kernel that lacks one makes [`create`](Self::create) fail with
    /// [`UnsupportedFeatures`](Error::UnsupportedFeatures), which names it.
    pub fn require_features(&mut self, features: FeatureFlags) -> &mut Self {
        self.wanted.required |= features;
        self
    }

    /// Features that are welcome. Adds to those requested before. [`Uffd::features`] tells which were got.
    ///
    /// Left out without an error are those that the kernel lacks, `EVENT_FORK` where this process may not use
    /// it, and `RWP_ASYNC` where `RWP` isn't asked for.
    pub fn request_features(&mut self, features: FeatureFlags) -> &mut Self {
        self.wanted.requested |= features;
        self
    }

    /// Operations without which no [`Uffd`] is made, or nothing registered. Adds to those required
    /// before.
    ///
    /// Operations of the descriptor are looked for by [`create`](Self::create), those of a range by
    /// [`Uffd::register_with_mode`]; both fail with [`UnsupportedIoctls`](Error::UnsupportedIoctls).
    pub fn require_ioctls(&mut self, ioctls: IoctlFlags) -> &mut Self {
        self.wanted.ioctls |= ioctls;
        self
    }

    /// Which way the descriptor is created. The default is [`OpenWith::Auto`].
    pub fn open_with(&mut self, open_with: OpenWith) -> &mut Self {
        self.open_with = open_with;
        self
    }

    /// Creates a descriptor and shakes hands about features.
    ///
    /// # Errors
    ///
    /// - [`OpenFailed`](Error::OpenFailed), [`OpenDevUserfaultfd`](Error::OpenDevUserfaultfd): no descriptor.
    /// - [`UnsupportedFeatures`](Error::UnsupportedFeatures): the kernel lacks a required feature.
    /// - [`FeatureNotPermitted`](Error::FeatureNotPermitted): `EVENT_FORK` is required without
    ///   `CAP_SYS_PTRACE`.
    /// - [`FeatureNeeds`](Error::FeatureNeeds): `RWP_ASYNC` is required without `RWP`.
    /// - [`UnsupportedIoctls`](Error::UnsupportedIoctls): a required operation of the descriptor is missing.
    /// - [`SystemError`](Error::SystemError): anything else that `UFFDIO_API` may answer.
    pub fn create(&self) -> Result<Uffd> {
        Ok(self.shake_hands(open::open(self.open_with, self.flags)?)?.made_here())
    }

    /// Like [`create`](Self::create), through a `/dev/userfaultfd` that is already open: for a process that
    /// can't open it any more, or that was handed it.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create). A descriptor of something else is [`OpenFailed`](Error::OpenFailed) with
    /// `ENOTTY`, or with what another device of the kernel's says.
    ///
    /// ```no_run
    /// use std::fs::File;
    /// use userfaultfd::UffdBuilder;
    ///
    /// let device = File::open("/dev/userfaultfd")?;
    /// // ... drop privileges ...
    /// let uffd = UffdBuilder::new().user_mode_only(false).from_device(&device)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[doc(alias = "USERFAULTFD_IOC_NEW")]
    pub fn from_device(&self, device: impl AsFd) -> Result<Uffd> {
        Ok(self.shake_hands(open::open_from(device.as_fd(), self.flags)?)?.made_here())
    }

    /// Shakes hands on a userfaultfd that was created elsewhere and hasn't done so. What this builder says
    /// about creating a descriptor has no effect then. On an error the descriptor is closed.
    ///
    /// A descriptor whose handshake is done is adopted by `Uffd::from`.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create); also [`AlreadyHandshaken`](Error::AlreadyHandshaken) and
    /// [`NotUserfaultfd`](Error::NotUserfaultfd).
    #[doc(alias = "UFFDIO_API")]
    pub fn handshake(&self, fd: OwnedFd) -> Result<Uffd> {
        if !sys::is_userfaultfd(fd.as_fd()) {
            return Err(Error::NotUserfaultfd);
        }
        self.shake_hands(fd)
    }

    fn shake_hands(&self, fd: OwnedFd) -> Result<Uffd> {
        let got = negotiate(self.wanted, |features| api(&fd, features), || self.probe())?;
        Ok(Uffd::new(fd, got))
    }

    /// Finds out what the kernel offers, with a descriptor opened as this builder would.
    pub(crate) fn probe(&self) -> Result<Support> {
        // The fewest rights: what the kernel offers doesn't depend on this flag.
        let flags = OpenFlags { user_mode_only: true, ..self.flags };
        let fd = open::open(self.open_with, flags)?;
        Ok(api(&fd, FeatureFlags::empty())?)
    }
}

/// The handshake. Answers with all that the kernel offers, which is more than what was asked for.
fn api(fd: &OwnedFd, features: FeatureFlags) -> Result<Support, Errno> {
    let mut arg = sys::uffdio_api { api: sys::UFFD_API, features: features.bits(), ioctls: 0 };
    sys::api(fd.as_fd(), &mut arg)?;
    Ok(Support {
        features: FeatureFlags::from_bits_retain(arg.features),
        ioctls: IoctlFlags::from_bits_retain(arg.ioctls),
    })
}

/// What a builder was told to get.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    required: FeatureFlags,
    requested: FeatureFlags,
    ioctls: IoctlFlags,
}

/// Gets what is wanted from a kernel, of which only the answers to `api` and `probe` are known here.
///
/// With nothing requested it asks once, for exactly what is required. A handshake that fails leaves the
/// descriptor as it was and tells nothing but an errno; one that succeeds can't be repeated. So what the
/// kernel offers is probed with another descriptor, before asking for what it may lack and after a refusal.
fn negotiate(
    wanted: Wanted,
    api: impl Fn(FeatureFlags) -> Result<Support, Errno>,
    probe: impl Fn() -> Result<Support>,
) -> Result<Terms> {
    let Wanted { required, requested, .. } = wanted;
    let mut ask = required;
    if !required.contains(requested) {
        ask |= requested & probe()?.features;
        if !ask.contains(FeatureFlags::RWP) && !required.contains(FeatureFlags::RWP_ASYNC) {
            ask.remove(FeatureFlags::RWP_ASYNC);
        }
    }
    let fork = FeatureFlags::EVENT_FORK;
    let answer = match api(ask) {
        Err(Errno::EPERM) if ask.contains(fork) && !required.contains(fork) => {
            ask.remove(fork);
            api(ask)
        }
        answer => answer,
    };
    let offered = answer.map_err(|errno| refusal(errno, ask, &probe))?;
    // Some kernels (6.1 to 6.1.25) accept a feature that they don't have.
    let missing = ask.difference(offered.features);
    if !missing.is_empty() {
        return Err(Error::UnsupportedFeatures { missing, supported: offered.features });
    }
    if !offered.ioctls.contains(wanted.ioctls & IoctlFlags::OF_DESCRIPTOR) {
        return Err(Error::UnsupportedIoctls(offered.ioctls));
    }
    if ask.contains(FeatureFlags::WP_ASYNC) {
        ask |= FeatureFlags::WP_UNPOPULATED & offered.features;
    }
    let got = Support { features: ask, ioctls: offered.ioctls };
    Ok(Terms::negotiated(got, wanted.ioctls.difference(IoctlFlags::OF_DESCRIPTOR)))
}

/// Why the handshake was refused.
fn refusal(errno: Errno, asked: FeatureFlags, probe: impl Fn() -> Result<Support>) -> Error {
    match errno {
        Errno::EPERM if asked.contains(FeatureFlags::EVENT_FORK) => {
            Error::FeatureNotPermitted(FeatureFlags::EVENT_FORK)
        }
        Errno::EINVAL => match probe() {
            Ok(Support { features: supported, .. }) => {
                let missing = asked.difference(supported);
                if !missing.is_empty() {
                    Error::UnsupportedFeatures { missing, supported }
                } else if asked.contains(FeatureFlags::RWP_ASYNC) && !asked.contains(FeatureFlags::RWP) {
                    Error::FeatureNeeds { feature: FeatureFlags::RWP_ASYNC, needs: FeatureFlags::RWP }
                } else {
                    Error::AlreadyHandshaken
                }
            }
            // No second descriptor is to be had, so the reason can't be told apart.
            Err(_) => Error::SystemError(errno),
        },
        errno => Error::SystemError(errno),
    }
}

impl Support {
    /// Asks the kernel. Opens a descriptor for faults from user mode, which takes the fewest rights, and
    /// closes it.
    ///
    /// # Errors
    ///
    /// [`OpenFailed`](crate::Error::OpenFailed) when no descriptor can be had; its
    /// [`reason`](crate::OpenFailure::reason) tells "not built in" from "not permitted".
    pub fn probe() -> Result<Self> {
        UffdBuilder::new().close_on_exec(true).probe()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// A kernel: what it offers, whether it checks features, whether it grants EVENT_FORK.
    #[derive(Clone, Copy)]
    struct Kernel {
        features: FeatureFlags,
        checks: bool,
        grants_fork: bool,
    }

    const LINUX_5_10: Kernel =
        Kernel { features: FeatureFlags::from_bits_retain(0x1ff), checks: true, grants_fork: true };
    const LINUX_7_3: Kernel = Kernel { features: FeatureFlags::from_bits_retain(0x7ffff), ..LINUX_5_10 };

    impl Kernel {
        fn offer(self) -> Support {
            let set_mode = self.features.contains(FeatureFlags::RWP);
            let ioctls = IoctlFlags::API | IoctlFlags::REGISTER | IoctlFlags::UNREGISTER;
            Support {
                features: self.features,
                ioctls: if set_mode { ioctls | IoctlFlags::SET_MODE } else { ioctls },
            }
        }

        /// The checks of UFFDIO_API, in the kernel's order.
        fn api(self, features: FeatureFlags) -> Result<Support, Errno> {
            let rwp_alone =
                features.contains(FeatureFlags::RWP_ASYNC) && !features.contains(FeatureFlags::RWP);
            if features.contains(FeatureFlags::EVENT_FORK) && !self.grants_fork {
                Err(Errno::EPERM)
            } else if self.checks && (rwp_alone || !self.features.contains(features)) {
                Err(Errno::EINVAL)
            } else {
                Ok(self.offer())
            }
        }

        fn negotiate(self, required: FeatureFlags, requested: FeatureFlags) -> Result<FeatureFlags> {
            let wanted = Wanted { required, requested, ..Wanted::default() };
            let terms = negotiate(wanted, |features| self.api(features), || Ok(self.offer()))?;
            Ok(terms.support().expect("the builder knows its terms").features)
        }
    }

    const NONE: FeatureFlags = FeatureFlags::empty();

    #[test]
    fn handshake_requests_exactly_required_features() {
        crate::support::require!();
        let asked = Cell::new(None);
        let wanted = Wanted { required: FeatureFlags::THREAD_ID, ..Wanted::default() };
        let api = |features| {
            assert_eq!(asked.replace(Some(features)), None, "asked twice");
            LINUX_7_3.api(features)
        };
        negotiate(wanted, api, || panic!("probed")).unwrap();
        assert_eq!(asked.get(), Some(FeatureFlags::THREAD_ID));
    }

    #[test]
    fn required_feature_that_is_missing_is_named() {
        crate::support::require!();
        let required = FeatureFlags::THREAD_ID | FeatureFlags::MOVE | FeatureFlags::from_bits_retain(1 << 40);
        let error = LINUX_5_10.negotiate(required, NONE).unwrap_err();
        let Error::UnsupportedFeatures { missing, supported } = error else { panic!("{error}") };
        assert_eq!(missing, FeatureFlags::MOVE | FeatureFlags::from_bits_retain(1 << 40));
        assert_eq!(supported, LINUX_5_10.features);
    }

    #[test]
    fn ignored_unknown_features_count_as_missing() {
        crate::support::require!();
        let sloppy = Kernel { checks: false, ..LINUX_5_10 };
        let error = sloppy.negotiate(FeatureFlags::POISON, NONE).unwrap_err();
        assert!(matches!(error, Error::UnsupportedFeatures { missing: FeatureFlags::POISON, .. }), "{error}");
    }

    #[test]
    fn requested_features_are_taken_where_there_are() {
        crate::support::require!();
        let both = FeatureFlags::THREAD_ID | FeatureFlags::MOVE;
        assert_eq!(LINUX_5_10.negotiate(NONE, both).unwrap(), FeatureFlags::THREAD_ID);
        assert_eq!(LINUX_7_3.negotiate(NONE, both).unwrap(), both);
        assert_eq!(LINUX_7_3.negotiate(FeatureFlags::SIGBUS, both).unwrap(), both | FeatureFlags::SIGBUS);
    }

    #[test]
    fn fork_events_without_right_are_dropped_or_an_error() {
        crate::support::require!();
        let user = Kernel { grants_fork: false, ..LINUX_7_3 };
        let both = FeatureFlags::EVENT_FORK | FeatureFlags::EVENT_REMAP;
        assert_eq!(user.negotiate(NONE, both).unwrap(), FeatureFlags::EVENT_REMAP);
        let error = user.negotiate(both, NONE).unwrap_err();
        assert!(matches!(error, Error::FeatureNotPermitted(FeatureFlags::EVENT_FORK)), "{error}");
    }

    #[test]
    fn async_rwp_requires_rwp() {
        crate::support::require!();
        let error = LINUX_7_3.negotiate(FeatureFlags::RWP_ASYNC, NONE).unwrap_err();
        assert!(matches!(error, Error::FeatureNeeds { needs: FeatureFlags::RWP, .. }), "{error}");
        assert_eq!(LINUX_7_3.negotiate(NONE, FeatureFlags::RWP_ASYNC).unwrap(), NONE);
        let both = FeatureFlags::RWP_ASYNC | FeatureFlags::RWP;
        assert_eq!(LINUX_7_3.negotiate(FeatureFlags::RWP, both).unwrap(), both);
        assert_eq!(LINUX_5_10.negotiate(NONE, both).unwrap(), NONE);
    }

    #[test]
    fn wp_async_adds_wp_unpopulated() {
        crate::support::require!();
        let got = LINUX_7_3.negotiate(FeatureFlags::WP_ASYNC, NONE).unwrap();
        assert_eq!(got, FeatureFlags::WP_ASYNC | FeatureFlags::WP_UNPOPULATED);
        // Where it isn't offered it isn't there, whatever else is.
        let without =
            Kernel { features: LINUX_7_3.features.difference(FeatureFlags::WP_UNPOPULATED), ..LINUX_7_3 };
        assert_eq!(without.negotiate(FeatureFlags::WP_ASYNC, NONE).unwrap(), FeatureFlags::WP_ASYNC);
    }

    #[test]
    fn second_handshake_differs_from_missing_feature() {
        crate::support::require!();
        let wanted = Wanted { required: FeatureFlags::MOVE, ..Wanted::default() };
        let error = negotiate(wanted, |_| Err(Errno::EINVAL), || Ok(LINUX_7_3.offer())).unwrap_err();
        assert!(matches!(error, Error::AlreadyHandshaken), "{error}");
    }

    #[test]
    fn required_ioctls_are_checked_where_reported() {
        crate::support::require!();
        let ask = |kernel: Kernel, ioctls| {
            let wanted = Wanted { ioctls, ..Wanted::default() };
            negotiate(wanted, |features| kernel.api(features), || Ok(kernel.offer()))
        };
        let terms = ask(LINUX_5_10, IoctlFlags::COPY | IoctlFlags::REGISTER).unwrap();
        assert_eq!(terms.range_ioctls, IoctlFlags::COPY);
        assert!(matches!(ask(LINUX_5_10, IoctlFlags::SET_MODE), Err(Error::UnsupportedIoctls(_))));
        assert!(ask(LINUX_7_3, IoctlFlags::SET_MODE).is_ok());
    }
}
